// The page: what is asked, of which modes, and what became of it.

import { ApiError, getJson, keepKey, patiently, readKey, stream } from "./api.js";
import { Column } from "./column.js";
import { bodyOf, fromHash, pathOf, readSettings, toCurl, toHash, toPython } from "./request.js";
import { element } from "./trace.js";

const DEFAULT_MODES = 3; // asked at first; the others are a click away
const TRACES = ["topk", "summary", "none"]; // the server's --max-trace may refuse the first ones
const $ = (id) => document.getElementById(id);

const page = {
  model: null, // of /v1/models
  trace: TRACES[0],
  isChat: true, // until the server says that the model takes no chats
  running: null, // AbortController of the run
};

function notice(text, isError = false) {
  $("notice").textContent = text;
  $("notice").hidden = text === "";
  $("notice").classList.toggle("bad", isError);
}

function asksForKey(isAsked) {
  $("key-form").hidden = !isAsked;
  if (isAsked) $("key").focus();
}

function chosenModes() {
  return [...$("modes").querySelectorAll("input:checked")].map((box) => box.value);
}

function state() {
  return {
    question: $("question").value,
    modes: chosenModes(),
    settings: readSettings($("ask")),
  };
}

// -- The model ----------------------------------------------------------------------------------

async function loadModel() {
  $("run").disabled = true;
  try {
    const list = await patiently(() => getJson("v1/models"), {
      maxRetries: Infinity,
      onWait: (error, seconds) => notice(`${sentence(error.message)} Trying again in ${seconds} s.`),
    });
    notice("");
    asksForKey(false);
    showModel(list.data[0]);
    await loadPresets();
  } catch (error) {
    page.model = null;
    if (error instanceof ApiError && error.status === 401) return wantKey(error);
    notice(`The server cannot be asked: ${error.message}. Reload the page to try again.`, true);
  }
}

function wantKey(error) {
  notice(readKey() ? `${sentence(error.message)} The key given here is not accepted.` : "", true);
  $("key-open").hidden = false;
  asksForKey(true);
}

function sentence(text) {
  return text === "" ? "" : `${text[0].toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;
}

function showModel(model) {
  page.model = model;
  page.isChat = true;
  page.trace = TRACES[0];
  $("model").textContent = `${model.id}, ${model.max_model_len} tokens of context`;
  $("key-open").hidden = !readKey();
  $("example").hidden = !model.example;
  showModes(model.reasoning_modes);
  const efforts = Object.keys(model.reasoning_effort || {});
  fill($("effort"), efforts);
  applyHash();
  if ($("question").value === "" && model.example) $("question").value = model.example;
  $("run").disabled = false;
  showCode();
}

function showModes(modes) {
  const boxes = modes.map((mode, index) => {
    const label = element("label", "mode");
    const box = element("input");
    box.type = "checkbox";
    box.value = mode;
    box.checked = index < DEFAULT_MODES;
    label.append(box, mode);
    return label;
  });
  $("modes").replaceChildren(...boxes);
}

function fill(select, names) {
  const chosen = select.value;
  const own = select.options[0];
  select.replaceChildren(own, ...names.map((name) => new Option(name, name)));
  select.value = names.includes(chosen) ? chosen : "";
}

/** The names of presets are in the API's own description. */
async function loadPresets() {
  try {
    const document = await getJson("openapi.json");
    const preset = document.components.schemas.ReasoningBody.properties.preset;
    fill($("preset"), preset.examples || []);
    applyHash();
    showCode();
  } catch {
    $("preset").disabled = true; // the rest works without
  }
}

// -- A run --------------------------------------------------------------------------------------

async function run() {
  if (page.model === null || page.running) return;
  const asked = state();
  if (!check(asked)) return;
  page.running = new AbortController();
  busy(true);
  clearMarks();
  const columns = asked.modes.map((mode) => new Column(mode));
  $("results").replaceChildren(...columns.map((column) => column.root));
  const ended = await Promise.all(columns.map((column) => runColumn(column, asked)));
  page.running = null;
  busy(false);
  showCode(); // what the server refused has changed the request
  const done = ended.filter((each) => each === "done").length;
  $("status").textContent = `${done} of ${ended.length} answered`;
}

function check(asked) {
  let told = "";
  if (asked.question.trim() === "") told = "Write a question first.";
  else if (asked.modes.length === 0) told = "Choose a mode first.";
  else if (!$("ask").reportValidity()) told = "A setting is not valid.";
  $("status").textContent = told;
  if (asked.question.trim() === "") $("question").focus();
  return told === "";
}

function busy(isBusy) {
  $("run").disabled = isBusy;
  $("stop").disabled = !isBusy;
  $("results").setAttribute("aria-busy", String(isBusy));
  if (isBusy) $("status").textContent = "Running";
}

/** Ask one mode; returns how its column ended. */
async function runColumn(column, asked) {
  const { signal } = page.running;
  let ended = "done";
  try {
    await patiently(() => read(column, asked, signal), {
      signal,
      onWait: (error, seconds) =>
        column.say(`${sentence(error.message)} Trying again in ${seconds} s.`, false),
    });
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : "failed";
    column.say(ended === "failed" ? explain(error) : "", ended === "failed");
  }
  column.finish(ended);
  return ended;
}

/** Read a stream; asks again for less where the server says that it gives no such trace or chat. */
async function read(column, asked, signal) {
  const { trace, isChat } = page;
  column.start();
  try {
    const body = bodyFor(column.mode, asked, true);
    for await (const chunk of stream(pathOf(isChat), body, signal)) column.take(chunk);
  } catch (error) {
    if (!(error instanceof ApiError) || !givesWay(error, trace, isChat)) throw error;
    await read(column, asked, signal);
  }
}

function givesWay(error, trace, isChat) {
  if (error.param === "reasoning.trace" && trace !== "none") {
    page.trace = TRACES[TRACES.indexOf(trace) + 1];
    return true;
  }
  if (error.code === "no_chat_template" && isChat) {
    page.isChat = false;
    return true;
  }
  return false;
}

function explain(error) {
  if (!(error instanceof ApiError)) return `The connection failed: ${error.message}`;
  if (error.status === 401) wantKey(error);
  mark(error.param);
  const status = error.status ? `${error.status}: ` : "";
  return `${status}${error.message}${error.param ? ` (param: ${error.param})` : ""}`;
}

function mark(param) {
  const field = [...$("ask").querySelectorAll("[data-field]")].find((f) => f.dataset.field === param);
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  $("settings").open = true;
}

function clearMarks() {
  for (const field of $("ask").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function stop() {
  page.running?.abort();
}

// -- Links and code -----------------------------------------------------------------------------

function bodyFor(mode, asked, isStream) {
  const { model, trace, isChat } = page;
  return bodyOf({ ...asked, model: model.id, mode, trace, isChat, isStream });
}

function settingFields() {
  return [...$("ask").querySelectorAll("[data-field]")];
}

function applyHash() {
  if (!location.hash.includes("=")) return; // no link of ours
  const names = settingFields().map((field) => field.dataset.field);
  const { question, modes, settings } = fromHash(location.hash, names);
  if (question !== null) $("question").value = question;
  for (const field of settingFields()) {
    field.value = settings[field.dataset.field] ?? "";
    if (field.value !== "") $("settings").open = true;
  }
  if (modes === null) return;
  for (const box of $("modes").querySelectorAll("input")) box.checked = modes.includes(box.value);
}

function changed() {
  if (page.model === null) return;
  history.replaceState(null, "", `#${toHash(state())}`);
  showCode();
}

function showCode() {
  const asked = state();
  const select = $("code-mode");
  const modes = asked.modes.length ? asked.modes : page.model.reasoning_modes.slice(0, 1);
  const mode = modes.includes(select.value) ? select.value : modes.at(-1);
  select.replaceChildren(...modes.map((each) => new Option(each, each, false, each === mode)));
  const hasKey = readKey() !== "";
  $("curl").textContent = toCurl(pathOf(page.isChat), bodyFor(mode, asked, true), hasKey);
  $("python").textContent = toPython(page.isChat, bodyFor(mode, asked, false), hasKey);
}

/** Copy text; without a clipboard (plain HTTP from elsewhere) select it instead. */
async function copy(button, text, source) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    if (source) getSelection().selectAllChildren(source);
    button.textContent = source ? "Selected" : "In the address bar";
  }
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
}

// -- Events -------------------------------------------------------------------------------------

function listen() {
  $("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the part after # holds the settings
    $("results").focus();
  });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("ask").addEventListener("input", changed);
  $("stop").addEventListener("click", stop);
  $("example").addEventListener("click", () => {
    $("question").value = page.model.example;
    changed();
  });
  $("share").addEventListener("click", (event) => {
    changed();
    copy(event.currentTarget, location.href, null);
  });
  $("code-mode").addEventListener("change", showCode);
  for (const name of ["curl", "python"]) {
    $(`copy-${name}`).addEventListener("click", (event) => {
      copy(event.currentTarget, $(name).textContent, $(name));
    });
  }
  window.addEventListener("hashchange", () => {
    if (page.model === null) return;
    applyHash();
    showCode();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    }
  });
  listenForKeys();
}

function listenForKeys() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    keepKey($("key").value.trim());
    $("key").value = "";
    loadModel();
  });
  $("key-forget").addEventListener("click", () => {
    keepKey("");
    loadModel();
  });
  $("key-open").addEventListener("click", () => asksForKey($("key-form").hidden));
}

listen();
loadModel();
