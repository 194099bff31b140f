"""One file a family of formats: `recognise` looks at names, `convert` says what they are."""
