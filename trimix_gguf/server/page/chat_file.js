// -- chats as text: how they are kept, and files of them --------------------------------------------

const FILE_FORMAT = "trimix-chats";
const CHAT_VERSION = 1;
const MOST_FILE_BYTES = 5e7;
const P_NAMES = [...ROLES, "fused"];
const FAILURES = ["gone", "cut", "busy", "context", "failed", "needsKey"];

/** A chat as JSON; fractions have five digits, which is more than the page shows. */
function packed(chat, turns) {
  const short = (_, value) => (typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(5)) : value);
  return JSON.stringify(chatObject(chat, turns), short);
}

function chatObject({ title, time }, turns) {
  const saved = turns.map(({ question, leftOut, answer, beside }) => ({
    question, leftOut, answer: answerObject(answer), beside: beside ? answerObject(beside.answer) : null,
  }));
  return { version: CHAT_VERSION, title, time, turns: saved };
}

function answerObject({ text, pieces, mix, usage, end }) {
  return { text, pieces: pieces.map(({ text, p }) => [text, ...P_NAMES.map((name) => p[name] ?? null)]), mix, usage, end };
}

// What is read may be damaged, or by others: only what is expected is taken over.

function must(holds) {
  if (!holds) throw new TypeError("not a chat");
}

const isText = (value) => typeof value === "string";
const isNumber = (value) => Number.isFinite(value);
const isTime = (value) => isNumber(value) && Math.abs(value) <= 8.64e15; // as far as Date goes
const isNumbers = (values) => Array.isArray(values) && values.every(isNumber);

function readChat(saved) {
  must(saved?.version === CHAT_VERSION && isText(saved.title) && isTime(saved.time) && Array.isArray(saved.turns));
  return { title: saved.title.slice(0, 200), time: saved.time, turns: saved.turns.map(readTurn) };
}

function readTurn(saved, index) {
  const leftOut = saved?.leftOut ?? 0;
  must(isText(saved?.question) && Number.isInteger(leftOut) && leftOut >= 0 && leftOut <= index);
  const turn = { question: saved.question, leftOut, answer: readAnswer(saved.answer), beside: null };
  if (saved.beside != null) turn.beside = { question: saved.question, answer: readAnswer(saved.beside), main: turn };
  return turn;
}

function readAnswer(saved) {
  must(isText(saved?.text) && Array.isArray(saved.pieces));
  const usage = saved.usage ?? null;
  must(usage === null || (isNumber(usage.prompt) && isNumber(usage.answer)));
  return { text: saved.text, pieces: saved.pieces.map(readPiece), mix: readMix(saved.mix), usage, end: readEnd(saved.end) };
}

function readPiece(saved) {
  must(Array.isArray(saved) && saved.length === 1 + P_NAMES.length && isText(saved[0]));
  const known = P_NAMES.map((name, i) => [name, saved[i + 1]]).filter(([, p]) => p !== null);
  must(known.every(([, p]) => isNumber(p)));
  return { text: saved[0], p: Object.fromEntries(known) };
}

function readEnd(saved) {
  if (saved == null) return { name: "stopped" }; // the page was left before the end
  if (saved.failure === undefined) must(isText(saved.name));
  else must(FAILURES.includes(saved.failure) && isText(saved.detail));
  return saved.failure === undefined ? { name: saved.name } : { failure: saved.failure, detail: saved.detail };
}

function readMix(saved) {
  if (saved == null) return null;
  const { alpha, beta, method } = saved.weights;
  must(isNumber(alpha) && isNumber(beta) && isText(method));
  const mix = { weights: { alpha, beta, method }, perplexity: null, grid: null };
  if (isText(saved.trio)) mix.trio = saved.trio;
  if (saved.guard != null) mix.guard = Number(saved.guard);
  if (saved.perplexity != null) {
    const known = P_NAMES.filter((name) => isNumber(saved.perplexity[name]));
    mix.perplexity = Object.fromEntries(known.map((name) => [name, saved.perplexity[name]]));
  }
  if (saved.grid != null) {
    const { alphas, betas, mean_nll } = saved.grid;
    must(isNumbers(alphas) && isNumbers(betas) && Array.isArray(mean_nll) && mean_nll.length === alphas.length);
    must(mean_nll.every((row) => Array.isArray(row) && row.length === betas.length && row.every((v) => v === null || isNumber(v))));
    mix.grid = { alphas, betas, mean_nll };
  }
  return mix;
}

function exportChats(ids) {
  const chats = ids.filter(kept).map(keptText); // one that is damaged would spoil the file
  const text = `{"format": "${FILE_FORMAT}", "version": ${CHAT_VERSION}, "chats": [\n${chats.join(",\n")}\n]}\n`;
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const today = new Date().toLocaleDateString("sv"); // Swedish dates are YYYY-MM-DD
  element("a", { href: address, download: `trimix-chats-${today}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

/** Add the chats of a file: all of them, or none and a line that says why. */
async function importChats(file) {
  let texts;
  try {
    must(file.size <= MOST_FILE_BYTES);
    const saved = JSON.parse(await file.text());
    must(saved?.format === FILE_FORMAT && saved.version === CHAT_VERSION && Array.isArray(saved.chats));
    texts = saved.chats.map(readChat).map((chat) => packed(chat, chat.turns));
  } catch {
    return say("notChats", { name: file.name });
  }
  // As they would be read: a kept text says more than the page takes over.
  const known = new Set(keptIds().map(kept).filter(Boolean).map(({ chat, turns }) => packed(chat, turns)));
  const added = [];
  for (const text of texts.filter((text) => !known.has(text))) {
    const { id } = newChat();
    added.push(id);
    const why = put(places()[0], id, text);
    if (why) {
      added.forEach((id) => drop(id));
      return `${say(why)} ${say("notImported")}`;
    }
  }
  return say("imported", { n: number(added.length) });
}
