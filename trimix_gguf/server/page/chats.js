// -- chats, kept in this browser --------------------------------------------------------------------

const MOST_CHATS = 100;
const MOST_CHARS = 4e6; // browsers keep about five million for a page
const CHAT_KEY = "trimix.chat.";
let chat = newChat(); // {id, title, time} of `turns`; `said` is what of them was kept or read last
let undo = null; // what brings back what was last left or deleted

function newChat() {
  return { id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), title: "", time: Date.now() };
}

/** Where chats are kept, the best place first. */
function places() {
  return recall("localStorage", "keep") ?? true ? ["localStorage", "sessionStorage"] : ["sessionStorage"];
}

function chatKeys(place) {
  try { return Object.keys(window[place]).filter((key) => key.startsWith(CHAT_KEY)); } catch { return []; }
}

/** Put a chat's text in a place; says why that is not possible, else null. */
function put(place, id, text) {
  try {
    const others = chatKeys(place).filter((key) => key !== CHAT_KEY + id);
    const size = others.reduce((sum, key) => sum + window[place][key].length, text.length);
    if (others.length >= MOST_CHATS || size > MOST_CHARS) return "storageFull";
    window[place].setItem(CHAT_KEY + id, text);
    return null;
  } catch (error) {
    return /quota/i.test(error.name) ? "storageFull" : "storageBlocked";
  }
}

function drop(id, from = ["localStorage", "sessionStorage"]) {
  for (const place of from) {
    try { window[place].removeItem(CHAT_KEY + id); } catch { /* it keeps nothing */ }
  }
}

/** Keep a chat's text in the first place that takes it; says why it is not the best one. */
function keep(id, text) {
  let why = null;
  for (const place of places()) {
    const found = put(place, id, text);
    why ??= found;
    if (found) continue;
    if (place === "localStorage") drop(id, ["sessionStorage"]); // an older state
    return why;
  }
  return why;
}

function keepChat() {
  if (!turns.length) return;
  const there = kept(chat.id)?.chat;
  // Another tab went on with it meanwhile: from here on this is a chat of its own, so both stay.
  if (there && there.said !== chat.said) chat = newChat();
  if (there) chat.title = there.title; // another tab may have renamed it
  remember("sessionStorage", "current", chat.id);
  const why = keep(chat.id, packed(chat, turns));
  chat.said = saidIn(keptText(chat.id));
  bar("unkept", why);
}

/** The text of a kept chat; of two the one of this tab, which is newer. */
function keptText(id) {
  for (const place of ["sessionStorage", "localStorage"]) {
    try {
      const text = window[place].getItem(CHAT_KEY + id);
      if (text !== null) return text;
    } catch { /* it keeps nothing */ }
  }
  return null;
}

function keptIds() {
  const keys = new Set([...chatKeys("localStorage"), ...chatKeys("sessionStorage")]);
  return [...keys].map((key) => key.slice(CHAT_KEY.length));
}

/** The turns in the text of a chat, which are its end. */
function saidIn(text) {
  return text?.slice(text.indexOf(',"turns":')) ?? null;
}

/** {chat, turns} of a kept chat; null where there is none, or it is damaged. */
function kept(id) {
  try {
    const text = keptText(id);
    const { title, time, turns } = readChat(JSON.parse(text));
    return { chat: { id, title, time, said: saidIn(text) }, turns };
  } catch {
    return null;
  }
}

function titleOf({ chat, turns }) {
  return chat.title || turns[0]?.question.match(/^.{0,60}/su)[0] || say("newChat");
}

/** End the answer that comes, keep what is said, and take it off the page. */
function leaveChat() {
  running?.abort.abort();
  for (const part of running ? parts(running.turn) : []) part.answer.end ??= { name: "stopped" };
  running = null;
  setBusy(false);
  keepChat();
  turns.flatMap(parts).forEach(unpaint);
  stopInspecting();
}

function enterChat(entered) {
  ({ chat, turns } = entered);
  remember("sessionStorage", "current", chat.id);
  bar("unkept", null);
  $("turns").replaceChildren();
  turns.forEach(show);
  $("welcome").hidden = turns.length > 0;
}

function openChat(entered) {
  leaveChat();
  enterChat(entered);
  forgetUndo();
  $("question").focus();
}

function newConversation() {
  leaveChat();
  const before = { chat, turns };
  enterChat({ chat: newChat(), turns: [] });
  if (before.turns.length) offerUndo(() => openChat(before), "newChat");
  $("question").focus();
}

/** Delete chats by their ids; what was on the page comes back with them. */
function deleteChats(ids, ...words) {
  const hasCurrent = ids.includes(chat.id);
  if (hasCurrent) leaveChat();
  const before = { chat, turns };
  const texts = ids.map((id) => [id, keptText(id)]);
  ids.forEach((id) => drop(id));
  if (hasCurrent) enterChat({ chat: newChat(), turns: [] });
  listChats();
  offerUndo(() => {
    // Another tab may have kept one again, with more in it.
    for (const [id, text] of texts) if (text !== null && keptText(id) === null) keep(id, text);
    if (hasCurrent && !turns.length) openChat(before);
    listChats();
  }, ...words);
}

/** Keep all chats for good, or only in this tab. */
function moveChats(isForGood) {
  const texts = keptIds().map((id) => [id, keptText(id)]);
  remember("localStorage", "keep", isForGood);
  let why = null;
  for (const [id, text] of texts) {
    const found = keep(id, text);
    if (!isForGood && !found) drop(id, ["localStorage"]);
    why = found ?? why;
  }
  bar("unkept", why);
  showPrivacy();
}

// -- bars above the question: what just happened, and how to undo it --------------------------------

function tell(text) {
  $("status").textContent = text;
}

/** Show words by their name, or nothing; they change with the language of the page. */
function bar(id, name, values) {
  const words = $(id).firstElementChild;
  const text = name ? say(name, values) : "";
  $(id).hidden = !name;
  if (name && !values) words.dataset.text = name;
  else delete words.dataset.text;
  if (words.textContent === text) return;
  words.textContent = text;
  if (text) tell(text);
}

function offerUndo(action, ...words) {
  undo = action;
  bar("undone", ...words);
  placeUndo();
}

function forgetUndo() {
  undo = null;
  bar("undone", null);
}

/** In the list of chats while that is open, as nothing behind it can be pressed. */
function placeUndo() {
  const place = $("chats").open ? $("chats-bar") : $("bars");
  if ($("undone").parentElement !== place) place.append($("undone"));
}
