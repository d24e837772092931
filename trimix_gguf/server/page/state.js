// -- state: turns of {question, answer, beside, leftOut}, an answer {text, pieces, mix, usage, end} -
// `beside` is what only the large model says, {question, answer, main}; `leftOut` counts the oldest
// turns that were not read for this one. A turn and its `beside` are parts: each has an answer.

const ROLES = ["large_ins", "small_cpt", "small_base"];
const $ = (id) => document.getElementById(id);
let language = "en";
let turns = [];
let running = null; // {turn, part, abort} while an answer comes
let models = []; // of the server: its trios
let trios = []; // the same, where it has several
let serverWeights = null; // of requests that name none; without, the server chooses for each
let settings = { mix: "auto", alpha: 0.1, beta: 0.9, alone: "small_cpt", system: "", temperature: "", maxTokens: "" };

/** The value that a browser's storage keeps under a name; none where storage is blocked or full. */
function recall(storage, name) {
  try { return JSON.parse(window[storage].getItem(`trimix.${name}`)); } catch { return null; }
}

function remember(storage, name, value) {
  try { window[storage].setItem(`trimix.${name}`, JSON.stringify(value)); } catch { /* kept only in memory */ }
}

function say(name, values = {}) {
  return TEXTS[language][name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

function number(value, options = { maximumSignificantDigits: 4 }) {
  return new Intl.NumberFormat([language, "en"], options).format(value);
}

const weight = (value) => number(Math.round(value * 100) / 100 + 0); // + 0: no "-0"
const percent = (value) => number(value, { style: "percent", maximumSignificantDigits: 2 });

function element(tag, attributes = {}, ...children) {
  const made = tag in SVG ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}
const SVG = { svg: 1, rect: 1, circle: 1, text: 1, g: 1, title: 1 };

function parts(turn) {
  return turn.beside ? [turn, turn.beside] : [turn];
}

function button(name, onClick, kind = "quiet") {
  return element("button", { type: "button", class: kind, click: onClick }, say(name));
}
