// A request from the page's settings: as a body, as a link, as curl, as Python.

const TRACE_TOP_K = 6;

/** The settings that are set, by dotted name: {"reasoning.steps": 4, temperature: 0}. */
export function readSettings(form) {
  const settings = {};
  for (const field of form.querySelectorAll("[data-field]")) {
    const text = field.value.trim();
    if (text === "") continue;
    settings[field.dataset.field] = field.type === "number" ? Number(text) : text;
  }
  return settings;
}

/** The body of a chat, or of a completion where the model takes no chats. */
export function bodyOf({ model, question, mode, settings, trace, isChat, isStream }) {
  const body = { model };
  if (isChat) body.messages = [{ role: "user", content: question }];
  else body.prompt = question;
  const reasoning = { mode };
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("reasoning.")) reasoning[name.slice("reasoning.".length)] = value;
    else body[name] = value;
  }
  if (trace && trace !== "none") reasoning.trace = trace;
  if (trace === "topk") reasoning.trace_top_k = TRACE_TOP_K;
  body.reasoning = reasoning;
  if (isStream) Object.assign(body, { stream: true, stream_options: { include_usage: true } });
  return body;
}

export function pathOf(isChat) {
  return isChat ? "v1/chat/completions" : "v1/completions";
}

/** Question, modes and settings as the part of a URL after #; never the key. */
export function toHash({ question, modes, settings }) {
  const words = new URLSearchParams();
  if (question) words.set("q", question);
  if (modes.length) words.set("modes", modes.join(","));
  for (const [name, value] of Object.entries(settings)) words.set(shortName(name), String(value));
  return words.toString();
}

/** What toHash() wrote; `fields` are the names of settings that exist. */
export function fromHash(hash, fields) {
  const words = new URLSearchParams(hash.replace(/^#/, ""));
  const settings = {};
  for (const name of fields) {
    const value = words.get(shortName(name));
    if (value !== null) settings[name] = value;
  }
  const modes = words.get("modes");
  return { question: words.get("q"), modes: modes ? modes.split(",") : null, settings };
}

function shortName(name) {
  return name.replace("reasoning.", "");
}

/** A command for a POSIX shell. */
export function toCurl(path, body, hasKey) {
  const words = ["curl -N", quote(absolute(path)), "-H 'Content-Type: application/json'"];
  if (hasKey) words.push('-H "Authorization: Bearer $COCONUT_API_KEY"');
  words.push(`-d ${quote(JSON.stringify(body))}`);
  return words.join(" \\\n  ");
}

function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function absolute(path) {
  return new URL(path, document.baseURI.split("#")[0]).href;
}

/** A script for OpenAI's client, as it is. */
export function toPython(isChat, body, hasKey) {
  const own = Object.entries(body).filter(([name]) => name !== "reasoning");
  const fields = own.map(([name, value]) => `    ${name}=${literal(value)},`);
  fields.push(`    extra_body={"reasoning": ${literal(body.reasoning)}},`);
  const call = isChat ? "chat.completions" : "completions";
  const show = isChat ? "answer.choices[0].message.content" : "answer.choices[0].text";
  const key = hasKey ? 'os.environ["COCONUT_API_KEY"]' : '"-"';
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(absolute("v1"))}, api_key=${key})`,
    `answer = client.${call}.create(`,
    ...fields,
    ")",
    `print(${show})`,
    "print(answer.usage.reasoning)",
  ].join("\n");
}

/** JSON as Python writes it; strings are the same in both. */
function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    const items = Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${literal(v)}`);
    return `{${items.join(", ")}}`;
  }
  return JSON.stringify(value);
}
