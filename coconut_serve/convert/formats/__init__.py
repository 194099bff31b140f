"""One file per family of formats: `recognise` detects it by names, `convert` maps it to ours."""
