// -- Markdown within a line: emphasis, code, links --------------------------------------------------
// Every character of the source stays in the page, those of the syntax hidden. So what an answer
// says is its source, and each token has its place in it. Only nodes are made: no text becomes HTML.

const MOST_OPEN = 16; // marks that wait for their end; the oldest is forgotten
const MOST_URL = 2000;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}\p{M}]/u;
const RANK = { close: 0, open: 1, hide: 2 }; // at one position

/** What is hidden in a text, and what opens and closes, in order. Linear in its length. */
function inlineEvents(text) {
  const scan = { text, events: [], open: [], runs: null };
  const special = /[\\`*_~\[\]<]|!(?=\[)/g;
  for (let match; (match = special.exec(text)); ) special.lastIndex = READ[match[0]](scan, match.index);
  return scan.events.sort((a, b) => a.at - b.at || RANK[a.kind] - RANK[b.kind]);
}

// Each reads what begins at a position, and gives the position after it.
const READ = {
  "\\": readEscape, "`": readCode, "<": readAddress, "]": readLink,
  "*": readEmphasis, "_": readEmphasis, "~": readEmphasis,
  "[": (scan, at) => wait(scan, { sign: "[", at, n: 1 }),
  "!": (scan, at) => wait(scan, { sign: "[", at, n: 2 }),
};

function hide(scan, at, to) {
  if (to > at) scan.events.push({ kind: "hide", at, to });
}

function enclose(scan, tag, from, to, attributes = {}) {
  scan.events.push({ kind: "open", at: from, tag, attributes }, { kind: "close", at: to });
}

function wait(scan, mark) {
  if (scan.open.length === MOST_OPEN) scan.open.shift();
  scan.open.push(mark);
  return mark.at + mark.n;
}

/** The index of the newest mark that waits for this sign; -1 where there is none. */
function waiting(scan, sign) {
  let i = scan.open.length - 1;
  while (i >= 0 && scan.open[i].sign !== sign) i--;
  return i;
}

function readEscape(scan, at) {
  if (!PUNCTUATION.test(scan.text[at + 1] ?? "")) return at + 1;
  hide(scan, at, at + 1);
  return at + 2;
}

function runLength(text, at) {
  let n = 1;
  while (text[at + n] === text[at]) n++;
  return n;
}

function readCode(scan, at) {
  const n = runLength(scan.text, at);
  if (!scan.runs) {
    scan.runs = new Map();
    for (const { 0: run, index } of scan.text.matchAll(/`+/g)) {
      if (!scan.runs.has(run.length)) scan.runs.set(run.length, { places: [], i: 0 });
      scan.runs.get(run.length).places.push(index);
    }
  }
  const runs = scan.runs.get(n);
  while (runs && runs.places[runs.i] < at + n) runs.i++;
  const end = runs?.places[runs.i];
  if (end === undefined) return at + n;
  hide(scan, at, at + n);
  enclose(scan, "code", at + n, end);
  hide(scan, end, end + n);
  return end + n;
}

function readEmphasis(scan, at) {
  const { text } = scan;
  const [sign, n] = [text[at], runLength(text, at)];
  if (n > 3 || (sign === "~" && n !== 2)) return at + n;
  const [before, after] = [text.slice(Math.max(0, at - 2), at), text.slice(at + n, at + n + 2)];
  const isInside = sign === "_" && WORD.test(before.slice(-1)) && WORD.test(after[0] ?? "");
  const opens = /^\S/.test(after) && !isInside;
  let [start, left] = [at, n];
  if (/\S$/.test(before) && !isInside) {
    for (let i; left && (i = waiting(scan, sign)) >= 0; ) {
      scan.open.length = i + 1; // marks between the two are text
      const opener = scan.open[i];
      const used = Math.min(opener.n, left, 2);
      const from = opener.at + opener.n - used;
      hide(scan, from, from + used);
      enclose(scan, sign === "~" ? "del" : used === 2 ? "strong" : "em", from + used, start);
      hide(scan, start, start + used);
      opener.n -= used;
      if (!opener.n) scan.open.pop();
      start += used;
      left -= used;
    }
  }
  if (opens && left) wait(scan, { sign, at: start, n: left });
  return at + n;
}

/** Where a link may lead: to an address of the web, or to a mailbox. Null for all else. */
function safeAddress(written) {
  if (!/^(https?:\/\/|mailto:)/i.test(written) || written.length > MOST_URL || /[\p{Cc}\p{Cf}]/u.test(written)) return null;
  try {
    const { href, username, password } = new URL(written);
    return username || password ? null : href;
  } catch {
    return null;
  }
}

function linkTo(href) {
  return { href, title: href, rel: "noopener noreferrer", target: "_blank" };
}

/** [text](address): the address is shown behind the text. An image is a link too. */
function readLink(scan, at) {
  const { text } = scan;
  const i = waiting(scan, "[");
  if (i < 0) return at + 1;
  const opener = scan.open[i];
  scan.open.length = i;
  if (text[at + 1] !== "(" || at === opener.at + opener.n) return at + 1;
  const address = /<?([^\s<>[\]()]*(?:\([^\s<>[\]()]*\)[^\s<>[\]()]*)*)>?/y;
  const rest = /(?:[ \t]+"[^"\n]{0,300}")?[ \t]*\)/y;
  address.lastIndex = at + 2;
  const [whole, written] = address.exec(text);
  rest.lastIndex = address.lastIndex;
  const href = rest.test(text) ? safeAddress(written) : null;
  if (href === null) return at + 1;
  const from = at + 2 + (whole[0] === "<");
  hide(scan, opener.at, opener.at + opener.n);
  enclose(scan, "a", opener.at + opener.n, at, linkTo(href));
  hide(scan, at, from);
  enclose(scan, "bdi", from, from + written.length, { class: "target", dir: "ltr" });
  hide(scan, from + written.length, rest.lastIndex);
  scan.open = scan.open.filter(({ sign }) => sign !== "["); // no link within a link
  return rest.lastIndex;
}

/** <https://...> */
function readAddress(scan, at) {
  const address = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy;
  address.lastIndex = at;
  const written = address.exec(scan.text)?.[1];
  const href = written ? safeAddress(written) : null;
  if (href === null) return at + 1;
  hide(scan, at, at + 1);
  enclose(scan, "a", at + 1, at + 1 + written.length, linkTo(href));
  hide(scan, at + 1 + written.length, address.lastIndex);
  return address.lastIndex;
}

function write(parent, text, isHidden = false) {
  if (!text) return;
  if (isHidden) parent.append(element("span", { hidden: "" }, text));
  else if (parent.lastChild instanceof Text) parent.lastChild.appendData(text);
  else parent.append(text);
}

/** Lines {start, from, end} of a source as one text; `put` writes a part of it, with the hidden beginnings of its lines. */
function textOfLines(source, lines) {
  let text = "";
  const cuts = [];
  for (const { start, from, end } of lines) {
    if (from > start) cuts.push({ at: text.length, hidden: source.slice(start, from) });
    text += source.slice(from, end);
  }
  let next = 0;
  const put = (parent, from, to, isHidden) => {
    for (; cuts[next] && (cuts[next].at < to || to === text.length); next++) {
      const { at, hidden } = cuts[next];
      write(parent, text.slice(from, at), isHidden);
      write(parent, hidden, true);
      from = at;
    }
    write(parent, text.slice(from, to), isHidden);
  };
  return { text, put };
}

function writeInline(parent, source, lines) {
  const { text, put } = textOfLines(source, lines);
  let [here, at] = [parent, 0];
  for (const { kind, at: next, to, tag, attributes } of inlineEvents(text)) {
    if (next > at) put(here, at, next);
    at = next;
    if (kind === "hide") {
      put(here, at, to, true);
      at = to;
    } else if (kind === "close") {
      here = here.parentElement;
    } else {
      const made = tag === "a" && here.closest("a") ? element("span") : element(tag, attributes);
      here.append(made);
      here = made;
    }
  }
  put(here, at, text.length);
}
