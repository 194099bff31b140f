// The reference: routes and objects of /openapi.json as a page.

import { ApiError, getJson } from "./api.js";
import { element } from "./trace.js";

const $ = (id) => document.getElementById(id);

function nameOf(reference) {
  return reference.split("/").at(-1);
}

/** A schema in a few words: a name, a list of one, alternatives, values. */
function typeOf(schema) {
  if (schema.$ref) return nameOf(schema.$ref);
  const values = schema.enum || (schema.const === undefined ? null : [schema.const]);
  if (values) return values.map((value) => JSON.stringify(value)).join(" | ");
  const either = schema.anyOf || schema.oneOf || schema.allOf;
  if (either) return [...new Set(either.map(typeOf))].join(" | ");
  if (schema.type === "array") return `list of ${typeOf(schema.items || {})}`;
  if (Array.isArray(schema.type)) return schema.type.join(" | ");
  return [schema.type || "any", range(schema)].filter(Boolean).join(" ");
}

function range(schema) {
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const high = schema.maximum ?? schema.exclusiveMaximum;
  if (low === undefined && high === undefined) return "";
  return `${low ?? ""}..${high ?? ""}`;
}

/** What a type is about, as links to the objects that it names. */
function typeCell(schema, known) {
  const cell = element("td");
  for (const word of typeOf(schema).split(/\b/)) {
    if (!known.has(word)) {
      cell.append(word);
      continue;
    }
    const link = element("a", "", word);
    link.href = `#${word}`;
    cell.append(link);
  }
  return cell;
}

function table(names, rows) {
  const made = element("table");
  const head = element("tr");
  head.append(...names.map((name) => {
    const cell = element("th", "", name);
    cell.scope = "col";
    return cell;
  }));
  made.append(element("thead"), element("tbody"));
  made.tHead.append(head);
  made.tBodies[0].append(...rows);
  return made;
}

function fields(schema, known) {
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties || {}).map(([name, own]) => {
    const row = element("tr");
    const first = element("td");
    first.append(element("code", "", name), required.has(name) ? " (required)" : "");
    row.append(first, typeCell(own, known), element("td", "", own.description || ""));
    return row;
  });
  return table(["Field", "Type", "What"], rows);
}

function answers(operation, known) {
  const rows = Object.entries(operation.responses).map(([status, answer]) => {
    const row = element("tr");
    const schema = Object.values(answer.content || {})[0]?.schema || {};
    row.append(element("td", "", status), typeCell(schema, known));
    row.append(element("td", "", answer.description));
    return row;
  });
  return table(["Status", "Body", "What"], rows);
}

function route(path, method, operation, known) {
  const made = element("details", "panel");
  const summary = element("summary");
  summary.append(element("span", "method", method.toUpperCase()), " ", element("code", "", path));
  const about = operation.description || operation.summary || "";
  made.append(summary, element("p", "", about));
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  if (body) {
    const line = element("table");
    const row = element("tr");
    row.append(element("td", "", "Takes"), typeCell(body, known));
    line.append(row);
    made.append(line);
  }
  made.append(answers(operation, known));
  return made;
}

function object(name, schema, known) {
  const made = element("details", "panel");
  made.id = name;
  const summary = element("summary");
  summary.append(element("code", "", name));
  made.append(summary, element("p", "", schema.description || ""), fields(schema, known));
  return made;
}

function show(document) {
  const schemas = Object.entries(document.components.schemas);
  const known = new Set(schemas.map(([name]) => name));
  const routes = Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, own]) => route(path, method, own, known)),
  );
  $("version").textContent = `${document.info.summary}, version ${document.info.version}`;
  $("routes").replaceChildren(element("h2", "", "Routes"), ...routes);
  $("schemas").replaceChildren(
    element("h2", "", "Objects"),
    ...schemas.map(([name, schema]) => object(name, schema, known)),
  );
  $("notice").hidden = true;
  openTarget();
}

function openTarget() {
  const target = location.hash && $(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  target.open = true;
  target.scrollIntoView();
}

async function load() {
  try {
    show(await getJson("openapi.json"));
  } catch (error) {
    const isKey = error instanceof ApiError && error.status === 401;
    const told = isKey ? "Give the API key on the playground page first." : error.message;
    $("notice").textContent = told;
    $("notice").classList.add("bad");
  }
}

window.addEventListener("hashchange", openTarget);
load();
