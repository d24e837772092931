// -- the conversation -------------------------------------------------------------------------------

let follow = true; // the end of the page, as the answer grows

/** The script of most letters, where it needs a setting of its own. */
function scriptOf(text) {
  const count = (pattern) => text.match(pattern)?.length ?? 0;
  const letters = count(/[\p{L}\p{M}]/gu);
  const scripts = { mongolian: /[\u1820-\u18AA]/g, tibetan: /[\u0F40-\u0FBC]/g, arabic: /[\u0620-\u06FF]/g };
  return Object.keys(scripts).find((name) => 2 * count(scripts[name]) > letters) ?? "";
}

function textBody(text, attributes = {}) {
  return element("div", { class: `text ${scriptOf(text.data)}`, dir: "auto", lang: "", ...attributes }, text);
}

/** Make a turn's element, or make it again in its place. */
function show(turn) {
  unpaint(turn);
  if (inspected?.turn === turn) stopInspecting();
  const old = turn.view?.root;
  turn.view = { n: 0, covered: 0, marks: [], text: document.createTextNode("") };
  turn.view.root = element("article", { class: "turn" }, questionView(turn), answerView(turn));
  if (old) old.replaceWith(turn.view.root);
  else $("turns").append(turn.view.root);
  $("welcome").hidden = true;
  update(turn);
}

function questionView(turn) {
  const edit = button("edit", () => editQuestion(turn));
  edit.setAttribute("aria-label", say("editQuestion"));
  return element("div", { class: "question" },
    element("div", { class: "head" }, element("h2", {}, say("you")), element("span", { class: "actions idle" }, edit)),
    textBody(document.createTextNode(turn.question)));
}

function answerView(turn) {
  const { view } = turn;
  view.body = textBody(view.text, {
    role: "group",
    pointermove: (event) => { if (event.pointerType === "mouse") point(turn, event); },
    pointerleave: (event) => { if (event.pointerType === "mouse") stopInspecting(); },
    click: (event) => { if (getSelection().isCollapsed) point(turn, event); },
    keydown: (event) => stepTokens(turn, event),
    focus: () => { if (view.body.matches(":focus-visible") && view.marks.length) inspect(turn, 0); },
    blur: stopInspecting,
  });
  view.note = element("p", { class: "note" });
  view.copy = button("copy", () => copy(turn));
  view.actions = element("div", { class: "actions idle" }, view.copy, element("span", { class: "retry" }, button("retry", () => retry(turn))));
  view.why = element("details", { class: "why", toggle: () => {
    turn.isOpen = view.why.open;
    if (turn.isOpen) explain(turn);
  } }, element("summary", {}, say("why")), element("div"));
  return element("div", { class: "answer" }, element("h2", {}, say("answer")), view.body, view.note, view.actions, view.why);
}

/** Show a turn's answer as it is now. */
function update(turn) {
  const { view, answer } = turn;
  const more = answer.text.slice(view.text.length);
  view.text.appendData(more);
  if (more && (view.text.length < 400 || answer.end)) view.body.className = `text ${scriptOf(answer.text)}`;
  paint(turn);
  view.body.hidden = answer.text === "";
  if (view.marks.length && !view.body.hasAttribute("tabindex")) {
    view.body.setAttribute("tabindex", "0");
    view.body.setAttribute("aria-label", say("tokenHint"));
  }
  view.root.setAttribute("aria-busy", answer.end === null);
  view.copy.hidden = answer.text === "";
  view.why.hidden = answer.mix === null;
  if (turn.isOpen && answer.mix && !view.why.open) view.why.open = true;
  if (answer.end && view.why.open) explain(turn);
  updateNote(view.note, answer);
  if (follow) scrollTo(0, document.documentElement.scrollHeight);
}

function updateNote(note, answer) {
  const { end } = answer;
  const failed = end?.failure;
  const name = failed ?? { length: "length", context: "context", stopped: "stopped" }[end?.name] ?? (end && !answer.text ? "empty" : null);
  const text = name ? say(name) : end || answer.text ? "" : say("reading");
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
    submit: (event) => {
      event.preventDefault();
      if (!running && field.value.trim()) askInstead(turn, field.value);
    },
    keydown: (event) => {
      if (event.key === "Escape") close();
      if (isSend(event)) { event.preventDefault(); form.requestSubmit(); }
    },
  }, field, element("div", {}, element("button", { class: "main" }, say("askAgain")), button("cancel", close, "")));
  turn.view.root.querySelector(".question").replaceChildren(form);
  field.focus();
}

/** Put another question in a turn's place; later turns are removed. */
function askInstead(turn, question) {
  for (const later of turns.splice(turns.indexOf(turn) + 1)) {
    unpaint(later);
    later.view.root.remove();
  }
  turn.question = question.trim();
  $("question").focus();
  ask(turn);
}

async function copy(turn) {
  try {
    await navigator.clipboard.writeText(turn.answer.text);
  } catch { // there is none on a plain-HTTP page of another machine
    const field = element("textarea", { class: "unseen" });
    field.value = turn.answer.text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    turn.view.copy.focus();
  }
  turn.view.copy.textContent = say("copied");
  $("status").textContent = say("copied");
  setTimeout(() => { turn.view.copy.textContent = say("copy"); }, 2000);
}

function newConversation() {
  running?.abort.abort();
  running = null;
  turns.forEach(unpaint);
  stopInspecting();
  turns = [];
  keepTurns();
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  setBusy(false);
  $("question").focus();
}

function setBusy(busy) {
  document.body.classList.toggle("busy", busy);
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (hadFocus) $(busy ? "stop" : "send").focus();
  if (busy) $("status").textContent = say("answering");
}

function send() {
  const question = $("question").value.trim();
  if (running || !question) return;
  $("question").value = "";
  fitQuestion();
  const turn = { question, answer: null };
  turns.push(turn);
  ask(turn);
}

/** Enter sends, but not within an input method, nor on a touch keyboard, which has no Shift+Enter. */
function isSend(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && !matchMedia("(pointer: coarse)").matches;
}

function fitQuestion() {
  const field = $("question");
  setDirection(field);
  field.style.blockSize = "auto";
  field.style.blockSize = `${field.scrollHeight + 2}px`;
}

/** dir="auto" takes an empty field for left-to-right. */
function setDirection(field) {
  field.dir = field.value ? "auto" : TEXTS[language].dir;
}
