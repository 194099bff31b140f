// Asks the API: keys, errors, waiting where the server says so, server-sent events.

const KEY = "coconut-serve.key";
const MAX_RETRIES = 5;

/** An answer that is an error, or an error event of a stream, which has no status. */
export class ApiError extends Error {
  constructor(status, body, retryAfterSeconds = null) {
    const error = (body && body.error) || {};
    super(typeof error.message === "string" ? error.message : `the server answered ${status}`);
    this.status = status;
    this.param = typeof error.param === "string" ? error.param : null;
    this.code = typeof error.code === "string" ? error.code : null;
    this.retryAfterSeconds = retryAfterSeconds;
  }

  /** Whether the same request may succeed later. */
  get isTemporary() {
    return this.status === 429 || (this.status === 503 && this.code !== "engine_dead");
  }
}

export function readKey() {
  try {
    return sessionStorage.getItem(KEY) || "";
  } catch {
    return memoryKey;
  }
}

let memoryKey = ""; // where the browser refuses storage

export function keepKey(key) {
  memoryKey = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // It stays in memory until the page is left.
  }
}

/** Fetch a path of the API, relative to this page; throws ApiError. */
async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = readKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body ? JSON.stringify(body) : undefined,
    signal,
    cache: "no-store",
    credentials: "same-origin",
  });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // A proxy's page: the status says it.
  }
  const after = Number.parseInt(response.headers.get("Retry-After") || "", 10);
  return new ApiError(response.status, body, Number.isFinite(after) ? after : null);
}

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

/** Events of a stream as objects; ends at [DONE], throws at an error event. */
export async function* stream(path, body, signal) {
  const response = await request(path, { body, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(0, event); // the status was 200
    yield event;
  }
  throw new ApiError(0, { error: { message: "the connection ended before the answer did" } });
}

/** The data of each server-sent event; comments and other fields are skipped. */
async function* events(source) {
  const reader = source.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const parts = rest.split(/\r?\n/);
      rest = parts.pop();
      for (const line of parts) {
        if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}

/** Call `ask` again after the time that a full or loading server asks for. */
export async function patiently(ask, { signal, onWait, maxRetries = MAX_RETRIES }) {
  for (let tries = 0; ; tries += 1) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof ApiError) || !error.isTemporary || tries >= maxRetries) throw error;
      const seconds = Math.min(Math.max(error.retryAfterSeconds ?? 2, 1), 60);
      for (let left = seconds; left > 0; left -= 1) {
        onWait(error, left);
        await sleep(1, signal);
      }
    }
  }
}
