// Draws the steps of thinking as they come: likeliest tokens by step, entropy, norm.

const SVG = "http://www.w3.org/2000/svg";
const STEP_WIDTH = 56; // of a column, in CSS pixels; playground.css has the same
const CURVE_HEIGHT = 34;
const MAX_STEPS = 512; // more are counted, but not drawn
const KINDS = { latent: "hidden state", token: "token", distribution: "soft token" };

export function element(name, className = "", text = null) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  return made;
}

/** An action that is done once a frame, however often it is called for. */
export function eachFrame(action) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      action();
    });
  };
}

function svg(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

/** A token so that spaces and line ends can be seen. */
function visible(token) {
  const text = token.replace(/^ /, "").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  return text === "" ? "\u2423" : text;
}

function nameOf(top) {
  return visible(typeof top.token === "string" ? top.token : `#${top.token_id}`);
}

function percent(probability) {
  const share = probability * 100;
  if (share > 99.9 && share < 100) return ">99.9%";
  return share < 0.1 ? "<0.1%" : `${share.toFixed(share < 10 || share > 99 ? 1 : 0)}%`;
}

function number(value) {
  return Number.isFinite(value) ? value.toFixed(2) : "-";
}

/** The trace of one answer. */
export class Trace {
  constructor(mode) {
    this.mode = mode;
    this.steps = [];
    this.shown = -1; // the step whose distribution is shown
    this.isChosen = false; // by the reader, so new steps do not take its place
    this.root = element("section", "trace");
    this.root.hidden = true;
    this.root.setAttribute("aria-label", `Steps of thinking, ${mode}`);
    this.scroller = element("div", "scroller");
    this.curves = [new Curve("Entropy", "nats", "entropy"), new Curve("Norm", "", "norm")];
    this.map = element("div", "map");
    this.map.setAttribute("role", "group");
    this.map.setAttribute("aria-label", "Likeliest tokens of each step");
    for (const curve of this.curves) this.scroller.append(curve.root);
    this.scroller.append(this.map);
    this.detail = element("div", "detail");
    this.root.append(element("h3", "", "Trace"), this.scroller, this.detail);
    this.map.addEventListener("keydown", (event) => this.move(event));
    this.follow = eachFrame(() => this.showLast());
  }

  add(step) {
    this.steps.push(step);
    this.root.hidden = false;
    if (this.steps.length > MAX_STEPS) return;
    this.map.append(this.column(step, this.steps.length - 1));
    for (const curve of this.curves) curve.add(step[curve.field]);
    this.follow();
  }

  showLast() {
    if (this.isChosen) return;
    this.show(this.map.children.length - 1);
    this.scroller.scrollLeft = this.scroller.scrollWidth;
  }

  column(step, index) {
    const made = element("button", `step ${step.kind}`);
    made.type = "button";
    made.tabIndex = -1;
    made.append(element("span", "step-number", String(index + 1)));
    for (const top of step.top || []) {
      const cell = element("span", "cell", nameOf(top));
      cell.style.setProperty("--p", String(Math.round(Math.sqrt(top.prob) * 100)));
      made.append(cell);
    }
    made.setAttribute("aria-label", this.words(step, index));
    const choose = () => {
      this.isChosen = true;
      this.show(index);
    };
    made.addEventListener("mouseenter", choose);
    made.addEventListener("focus", choose);
    made.addEventListener("click", choose);
    return made;
  }

  words(step, index) {
    const tops = (step.top || []).map((top) => `${nameOf(top)} ${percent(top.prob)}`);
    const kind = KINDS[step.kind] || step.kind;
    return `Step ${index + 1}, ${kind}: ${[...tops, `entropy ${number(step.entropy)}`].join(", ")}`;
  }

  show(index) {
    const columns = this.map.children;
    if (columns[this.shown]) {
      columns[this.shown].classList.remove("shown");
      columns[this.shown].tabIndex = -1;
    }
    this.shown = index;
    columns[index].classList.add("shown");
    columns[index].tabIndex = 0;
    const step = this.steps[index];
    const facts = [`Step ${index + 1}`, KINDS[step.kind] || step.kind];
    facts.push(`entropy ${number(step.entropy)}`);
    if (step.norm) facts.push(`norm ${number(step.norm)}`);
    if (step.cosine) facts.push(`cosine with previous ${number(step.cosine)}`);
    this.detail.replaceChildren(element("p", "facts", facts.join(" \u00b7 ")), this.bars(step));
  }

  bars(step) {
    const list = element("ul", "bars");
    for (const top of step.top || []) {
      const item = element("li");
      const bar = element("span", "bar");
      bar.style.setProperty("--p", String(top.prob * 100));
      item.append(element("span", "token", nameOf(top)), bar);
      item.append(element("span", "share", percent(top.prob)));
      list.append(item);
    }
    return list;
  }

  move(event) {
    const last = this.map.children.length - 1;
    const to = { ArrowLeft: this.shown - 1, ArrowRight: this.shown + 1, Home: 0, End: last };
    if (!(event.key in to)) return;
    event.preventDefault();
    this.map.children[Math.min(Math.max(to[event.key], 0), last)].focus();
  }
}

/** A number by step, drawn above the columns of the steps. */
class Curve {
  constructor(name, unit, field) {
    this.name = name;
    this.unit = unit;
    this.field = field;
    this.values = [];
    this.root = element("div", `curve ${field}`);
    this.root.hidden = true;
    this.label = element("span", "curve-label");
    this.line = svg("polyline", { fill: "none", "stroke-width": 2 });
    this.dots = svg("g", {});
    this.picture = svg("svg", { height: CURVE_HEIGHT, role: "img" });
    this.picture.append(this.line, this.dots);
    this.root.append(this.label, this.picture);
    this.drawSoon = eachFrame(() => this.draw());
  }

  add(value) {
    this.values.push(Number.isFinite(value) ? value : 0);
    this.drawSoon();
  }

  draw() {
    const largest = Math.max(...this.values);
    this.root.hidden = largest <= 0; // steps that feed a token have no norm
    const range = `up to ${number(largest)} ${this.unit}`.trim();
    this.label.textContent = `${this.name}, ${range}`;
    this.picture.setAttribute("width", String(this.values.length * STEP_WIDTH));
    this.picture.setAttribute("aria-label", `${this.name} of ${this.values.length} steps, ${range}`);
    const height = CURVE_HEIGHT - 10;
    const points = this.values.map((value, index) => {
      const y = CURVE_HEIGHT - 5 - (largest > 0 ? (value / largest) * height : 0);
      return [(index + 0.5) * STEP_WIDTH, y];
    });
    this.line.setAttribute("points", points.map((point) => point.join(",")).join(" "));
    this.dots.replaceChildren(...points.map(([cx, cy]) => svg("circle", { cx, cy, r: 2.5 })));
  }
}
