// -- the conversation -------------------------------------------------------------------------------

let follow = true; // the end of the page, as the answer grows

/** The script of most letters, where it needs a setting of its own. */
function scriptOf(text) {
  const count = (pattern) => text.match(pattern)?.length ?? 0;
  const letters = count(/[\p{L}\p{M}]/gu);
  const scripts = { mongolian: /[\u1820-\u18AA]/g, tibetan: /[\u0F40-\u0FBC]/g, arabic: /[\u0620-\u06FF]/g };
  return Object.keys(scripts).find((name) => 2 * count(scripts[name]) > letters) ?? "";
}

/** The direction of the first letter. dir="auto" would look for it again at each node that comes. */
function direction(text) {
  const [letter] = text.match(/\p{L}/u) ?? ["a"];
  return /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u.test(letter) ? "rtl" : "ltr";
}

function textBody(text, attributes = {}) {
  return element("div", { class: `text ${scriptOf(text)}`, dir: "auto", lang: "", ...attributes }, text);
}

/** Make a turn's element, or make it again in its place. */
function show(turn) {
  parts(turn).forEach(unpaint);
  if (inspected && parts(turn).includes(inspected.turn)) stopInspecting();
  const old = turn.view?.root;
  const root = element("article", { class: "turn" }, questionView(turn));
  for (const part of parts(turn)) part.view = { root, n: 0, covered: 0, marks: [], grown: nothingGrown() };
  root.append(element("div", { class: turn.beside ? "answers two" : "answers" }, ...parts(turn).map(answerView)));
  if (old?.isConnected) old.replaceWith(root);
  else $("turns").append(root);
  $("welcome").hidden = true;
  parts(turn).forEach(update);
}

function questionView(turn) {
  const edit = button("edit", () => editQuestion(turn));
  edit.setAttribute("aria-label", say("editQuestion"));
  return element("div", { class: "question" },
    element("div", { class: "head" }, element("h2", {}, say("you")), element("span", { class: "actions idle" }, edit)),
    textBody(turn.question));
}

/** What a part of a turn answers. */
function answerView(turn) {
  const { view } = turn;
  view.body = textBody("", {
    role: "group",
    pointermove: (event) => { if (event.pointerType === "mouse") point(turn, event); },
    pointerleave: (event) => { if (event.pointerType === "mouse") stopInspecting(); },
    click: (event) => { if (getSelection().isCollapsed && !event.target.closest("a, button")) point(turn, event); },
    keydown: (event) => stepTokens(turn, event),
    focus: () => { if (view.body.matches(":focus-visible") && view.marks.length) inspect(turn, 0); },
    blur: stopInspecting,
  });
  view.leftOut = element("p", { class: "left-out" });
  view.note = element("p", { class: "note" });
  view.copy = button("copy", () => copy(turn));
  view.actions = element("div", { class: "actions idle" }, view.copy, element("span", { class: "retry" }, button("retry", () => retry(turn.main ?? turn))));
  view.why = element("details", { class: "why", toggle: () => {
    turn.isOpen = view.why.open;
    if (turn.isOpen) explain(turn);
  } }, element("summary", {}, say("why")), element("div"));
  const heading = turn.main ? say("large_ins") : say(turn.beside ? "fused" : "answer");
  view.box = element("div", { class: "answer" }, element("h2", {}, heading), view.leftOut, view.body, view.note, view.actions, view.why);
  return view.box;
}

/** Show a turn's answer as it is now. */
function update(turn) {
  const { view, answer } = turn;
  if (answer.text.length < 400 || answer.end) {
    view.body.className = `text ${scriptOf(answer.text)}`;
    view.body.dir = direction(answer.text);
  }
  unpaintFrom(turn, grow(view, answer.text, Boolean(answer.end)));
  paint(turn);
  view.body.hidden = answer.text === "";
  if (view.marks.length && !view.body.hasAttribute("tabindex")) {
    view.body.setAttribute("tabindex", "0");
    view.body.setAttribute("aria-label", say("tokenHint"));
  }
  view.box.setAttribute("aria-busy", answer.end === null);
  const isLeftOut = !turn.main && turn.leftOut > (turns[turns.indexOf(turn) - 1]?.leftOut ?? 0);
  view.leftOut.textContent = isLeftOut ? say("leftOut", { n: number(turn.leftOut) }) : "";
  view.copy.hidden = answer.text === "";
  view.why.hidden = answer.mix === null;
  if (turn.isOpen && answer.mix && !view.why.open) view.why.open = true;
  if (answer.end && view.why.open) explain(turn);
  updateNote(view.note, answer, running?.part === turn);
  if (follow) scrollTo(0, document.documentElement.scrollHeight);
}

const WORDS = { context: "tooLong" }; // of a failure, where they are not under its name

function updateNote(note, answer, isComing) {
  const { end } = answer;
  const failed = end?.failure;
  const name = failed ? WORDS[failed] ?? failed : { __proto__: null, length: "length", context: "context", stopped: "stopped" }[end?.name] ?? (end && !answer.text ? "empty" : null);
  const text = name ? say(name) : end || answer.text || !isComing ? "" : say("reading");
  if (note.textContent === text) return;
  note.classList.toggle("error", Boolean(failed));
  if (failed) note.setAttribute("role", "alert");
  else note.removeAttribute("role");
  note.replaceChildren(...(text ? [text] : []));
  if (failed === "failed" && end.detail) note.append(element("small", { dir: "auto", lang: "en" }, end.detail));
}

function editQuestion(turn) {
  if (running) return;
  const field = element("textarea", { dir: "auto", rows: 3, "aria-label": say("editQuestion") });
  field.value = turn.question;
  const close = () => { show(turn); turn.view.root.querySelector(".question button").focus(); };
  const form = element("form", {
    class: "edit",
    submit: async (event) => {
      event.preventDefault();
      if (await isAway()) return;
      if (!running && field.value.trim() && form.isConnected) askInstead(turn, field.value);
    },
    keydown: (event) => {
      if (event.key === "Escape" && !isComposed(event)) close();
      if (isSend(event)) { event.preventDefault(); form.requestSubmit(); }
    },
  }, field, element("div", {}, element("button", { class: "main" }, say("askAgain")), button("cancel", close, "")));
  turn.view.root.querySelector(".question").replaceChildren(form);
  field.focus();
}

/** Put another question in a turn's place; later turns are removed. */
function askInstead(turn, question) {
  for (const later of turns.splice(turns.indexOf(turn) + 1)) {
    parts(later).forEach(unpaint);
    later.view.root.remove();
  }
  turn.question = question.trim();
  $("question").focus();
  ask(turn);
}

function copy(turn) {
  return copyText(turn.answer.text, turn.view.copy);
}

async function copyText(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // there is none on a plain-HTTP page of another machine
    const field = element("textarea", { class: "unseen" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    pressed.focus();
  }
  tell(say("copied"));
  if (pressed.ariaLabel) return; // the words of a sign
  pressed.textContent = say("copied");
  setTimeout(() => { pressed.textContent = say("copy"); }, 2000);
}

function setBusy(busy) {
  document.body.classList.toggle("busy", busy);
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (hadFocus) $(busy ? "stop" : "send").focus();
  if (busy) tell(say("answering"));
}

/** Ask what is written. While the server is away, the words stay where they are. */
async function send() {
  if (trouble?.name === "gone" && (await isAway())) return;
  const question = $("question").value.trim();
  if (running || !question) return;
  writeQuestion("");
  const turn = { question, answer: null, beside: null, leftOut: 0 };
  turns.push(turn);
  ask(turn);
}

/** Whether a key is for an input method. Safari tells of the one that ends a word only by 229. */
function isComposed(event) {
  return event.isComposing || event.keyCode === 229;
}

/** Enter sends, but not within an input method, nor on a touch keyboard, which has no Shift+Enter. */
function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !isComposed(event) && !matchMedia("(pointer: coarse)").matches;
}

/** Put words into the field of the question. */
function writeQuestion(text) {
  $("question").value = text;
  fitQuestion();
}

function fitQuestion() {
  const field = $("question");
  remember("sessionStorage", "draft", field.value);
  setDirection(field);
  field.style.blockSize = "auto";
  field.style.blockSize = `${field.scrollHeight + 2}px`;
}

/** dir="auto" takes an empty field for left-to-right. */
function setDirection(field) {
  field.dir = field.value ? "auto" : TEXTS[language].dir;
}
