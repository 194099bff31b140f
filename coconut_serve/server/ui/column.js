// One answer: how it goes, what it thinks, what it says, what it took.

import { eachFrame, element, Trace } from "./trace.js";

const STATES = {
  waiting: "waiting",
  thinking: "thinking",
  answering: "answering",
  done: "done",
  stopped: "stopped",
  failed: "failed",
};

function duration(milliseconds) {
  if (milliseconds === null) return "-";
  if (milliseconds < 1000) return `${Math.round(milliseconds)} ms`;
  return `${(milliseconds / 1000).toFixed(2)} s`;
}

/** The column of a mode. */
export class Column {
  constructor(mode) {
    this.mode = mode;
    this.started = performance.now();
    this.firstToken = null; // milliseconds until text came, of thinking or answer
    this.firstAnswer = null; // until text of the answer came
    this.total = null;
    this.reason = null;
    this.trace = new Trace(mode);
    this.build();
    this.followThought = eachFrame(() => {
      this.thought.text.scrollTop = this.thought.text.scrollHeight;
    });
    this.setState("waiting");
    this.count(null);
  }

  build() {
    this.root = element("article", "column");
    this.root.setAttribute("aria-label", `Mode ${this.mode}`);
    this.root.dataset.mode = this.mode;
    const head = element("header", "column-head");
    this.state = element("span", "state");
    head.append(element("h2", "", this.mode), this.state);
    this.note = element("p", "column-note");
    this.note.hidden = true;
    this.answer = this.textPart("Answer", "answer");
    this.answer.text.setAttribute("aria-live", "polite");
    this.thought = this.textPart("Thinking", "thought");
    this.thought.root.hidden = true;
    this.warnings = element("ul", "warnings");
    this.warnings.hidden = true;
    this.warnings.setAttribute("aria-label", "Warnings");
    this.counts = element("dl", "counts");
    this.root.append(
      head, this.note, this.answer.root, this.thought.root, this.trace.root, this.counts, this.warnings,
    );
  }

  textPart(name, className) {
    const root = element("section", className);
    const text = element("div", "text");
    text.setAttribute("aria-busy", "true");
    root.append(element("h3", "", name), text);
    return { root, text };
  }

  setState(state) {
    this.root.dataset.state = state;
    this.state.textContent = STATES[state];
  }

  /** Say what is in the way: an error, or that the server asks to wait. */
  say(text, isError) {
    this.note.textContent = text;
    this.note.hidden = text === "";
    this.note.classList.toggle("bad", isError);
    this.note.setAttribute("role", isError ? "alert" : "status");
  }

  /** Begin (again): waiting for a place counts as no part of the time. */
  start() {
    this.started = performance.now();
    this.say("", false);
  }

  /** Take a chunk of the stream. */
  take(chunk) {
    const choice = (chunk.choices || [])[0];
    if (choice) this.takeChoice(choice);
    if (chunk.usage) this.count(chunk.usage);
  }

  takeChoice(choice) {
    const delta = choice.delta || choice;
    for (const step of choice.reasoning_trace || []) {
      this.setState("thinking");
      this.trace.add(step);
    }
    const thought = delta.reasoning || delta.reasoning_content || "";
    const said = delta.content || choice.text || "";
    const now = performance.now() - this.started;
    if (thought || said) this.firstToken ??= now;
    if (thought) {
      this.setState("thinking");
      this.thought.root.hidden = false;
      this.thought.text.append(thought);
      this.followThought();
    }
    if (said) {
      this.firstAnswer ??= now;
      this.setState("answering");
      this.answer.text.append(said);
    }
    if (choice.finish_reason) this.reason = choice.finish_reason;
  }

  /** The stream is over, however it ended. */
  finish(state) {
    this.total = performance.now() - this.started;
    this.setState(state);
    for (const part of [this.answer, this.thought]) part.text.setAttribute("aria-busy", "false");
    if (state === "done" && this.answer.text.textContent === "") {
      this.answer.text.append(element("em", "", "no text"));
    }
    this.count(this.usage || null);
  }

  count(usage) {
    this.usage = usage;
    const told = (usage && usage.reasoning) || {};
    const rows = [
      ["First token", duration(this.firstToken)],
      ["First of the answer", duration(this.firstAnswer)],
      ["Total", duration(this.total)],
      ["Thinking steps", told.reasoning_steps ?? (this.trace.steps.length || "-")],
      ["Forward passes", told.forward_passes ?? "-"],
      ["Prompt tokens", usage?.prompt_tokens ?? "-"],
      ["Completion tokens", usage?.completion_tokens ?? "-"],
      ["Thinking ended by", told.halt_reason ?? "-"],
      ["Answer ended by", this.reason ?? "-"],
    ];
    this.counts.replaceChildren(
      ...rows.map(([name, value]) => {
        const row = element("div");
        row.append(element("dt", "", name), element("dd", "", String(value)));
        return row;
      }),
    );
    const warnings = Array.isArray(told.warnings) ? told.warnings : [];
    this.warnings.replaceChildren(...warnings.map((text) => element("li", "", String(text))));
    this.warnings.hidden = warnings.length === 0;
  }
}
