// -- a token's numbers ------------------------------------------------------------------------------

let inspected = null; // {turn, index}

function shown(text) {
  return text.trim() ? text : text.replace(/\n/g, "↵").replace(/\s/g, "␣");
}

function named(p) {
  return [...ROLES, "fused"].filter((name) => name in p);
}

function numbersTable(piece) {
  const rows = named(piece.p).map((name) =>
    element("tr", {}, element("th", { scope: "row" }, element("i", { class: `swatch ${name}`, hidden: name === "fused" ? "" : null }), say(name)), element("td", {}, element("bdi", {}, percent(piece.p[name])))),
  );
  return [element("div", { class: "piece", dir: "auto", lang: "" }, shown(piece.text)), element("table", {}, element("tbody", {}, ...rows))];
}

function numbersText(piece) {
  return `${shown(piece.text)}: ${named(piece.p).map((name) => `${say(name)} ${percent(piece.p[name])}`).join(", ")}`;
}

function inspect(turn, index) {
  const { range, piece } = turn.view.marks[index];
  inspected = { turn, index };
  const current = CSS.highlights?.get("token");
  current?.clear();
  current?.add(range);
  const card = $("card");
  card.replaceChildren(...numbersTable(piece));
  card.hidden = false;
  const at = range.getClientRects()[0] ?? shownParent(range).getBoundingClientRect();
  const [width, height] = [card.offsetWidth, card.offsetHeight];
  const x = Math.max(8, Math.min(at.left + at.width / 2 - width / 2, document.documentElement.clientWidth - width - 8));
  const below = at.bottom + 8 + height < document.querySelector("footer").getBoundingClientRect().top;
  const y = below || at.top < height + 16 ? at.bottom + 8 : at.top - height - 8;
  card.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
}

/** The part of the page that holds a range of hidden signs. */
function shownParent(range) {
  return range.startContainer.parentElement.closest(":not([hidden])");
}

function stopInspecting() {
  inspected = null;
  $("card").hidden = true;
  CSS.highlights?.get("token").clear();
}

function markAt(turn, x, y) {
  const position = document.caretPositionFromPoint?.(x, y);
  const range = position ? null : document.caretRangeFromPoint?.(x, y);
  const [node, offset] = position ? [position.offsetNode, position.offset] : [range?.startContainer, range?.startOffset];
  if (!node || !turn.view.body.contains(node)) return -1;
  const holds = ({ range }) => [...range.getClientRects()].some((r) => r.left <= x && x <= r.right && r.top <= y && y <= r.bottom);
  return turn.view.marks.findIndex((mark) => mark.range.isPointInRange(node, offset) && holds(mark));
}

function point(turn, event) {
  const index = markAt(turn, event.clientX, event.clientY);
  if (index >= 0) inspect(turn, index);
  else stopInspecting();
}

function stepTokens(turn, event) {
  const { marks, body } = turn.view;
  if (event.target !== body) return; // a link or a button in it
  const forward = getComputedStyle(body).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
  const back = forward === "ArrowLeft" ? "ArrowRight" : "ArrowLeft";
  const at = inspected?.turn === turn ? inspected.index : -1;
  const target = { [forward]: at + 1, [back]: at - 1, ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: marks.length - 1 }[event.key];
  if (target === undefined || event.ctrlKey || event.altKey || event.metaKey || !marks.length) return;
  event.preventDefault();
  const index = Math.max(0, Math.min(marks.length - 1, target));
  shownParent(marks[index].range).scrollIntoView({ block: "nearest" });
  inspect(turn, index);
  $("status").textContent = numbersText(marks[index].piece);
}
