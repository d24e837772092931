// -- tokens -> pieces of whole characters, and their colours ----------------------------------------

const graphemes = "Segmenter" in Intl ? new Intl.Segmenter(undefined, { granularity: "grapheme" }) : null;

function times(p, q) {
  return Object.fromEntries(Object.entries(q).map(([name, value]) => [name, value * p[name]]));
}

/** Tokens that share a character are one piece; its probability is their product. */
function addToken(answer, { text, probabilities }) {
  const last = answer.pieces.at(-1);
  // No text: the token ends inside a character, and the next one completes it.
  if (last && (last.text === "" || isInside(last.text + text, last.text.length))) {
    last.text += text;
    last.p = times(last.p, probabilities);
  } else {
    answer.pieces.push({ text, p: probabilities });
  }
}

function isInside(text, at) {
  return graphemes !== null && at < text.length && graphemes.segment(text).containing(at).index !== at;
}

const STEPS = 6; // shares of three models in sixths: 28 colours
const INKS = [[0, 114, 178], [230, 159, 0], [85, 85, 85]]; // told apart by the colour-blind too

/** How many sixths of the probability each model has; null where all have none. */
function shares(p) {
  const values = ROLES.map((role) => p[role] ?? 0);
  const sum = values.reduce((a, b) => a + b, 0);
  if (!(sum > 0)) return null;
  const large = Math.round((STEPS * values[0]) / sum);
  const cpt = Math.min(STEPS - large, Math.round((STEPS * values[1]) / sum));
  return [large, cpt, STEPS - large - cpt];
}

/** The more one model prefers a piece, the stronger its colour; pale where all agree. */
function prepareColours() {
  if (!("highlights" in CSS)) return;
  let rules = "";
  for (let large = 0; large <= STEPS; large++) {
    for (let cpt = 0; cpt <= STEPS - large; cpt++) {
      const parts = [large, cpt, STEPS - large - cpt];
      const [r, g, b] = [0, 1, 2].map((i) => Math.round(parts.reduce((sum, n, k) => sum + n * INKS[k][i], 0) / STEPS));
      const strength = 0.08 + (0.4 * (Math.max(...parts) - STEPS / 3)) / (STEPS - STEPS / 3);
      CSS.highlights.set(`mix-${parts.join("-")}`, new Highlight());
      const name = `::highlight(mix-${parts.join("-")})`;
      rules += `.coloured .text${name}, .coloured .text *${name} { background-color: rgba(${r}, ${g}, ${b}, ${strength.toFixed(2)}); }\n`;
    }
  }
  const current = new Highlight();
  current.priority = 1;
  CSS.highlights.set("token", current);
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(rules);
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
}

/** Ranges over the text: nothing is cut, so joined letters stay joined. */
function paint(turn) {
  const { view, answer } = turn;
  // The newest piece waits: the next token may belong to its last character.
  const n = answer.pieces.length - (answer.end ? 0 : 1);
  for (; view.n < n; view.n++) {
    const piece = answer.pieces[view.n];
    const [start, end] = [view.covered, view.covered + piece.text.length];
    if (end > view.grown.length) return;
    view.covered = end;
    if (piece.text === "" || answer.text.slice(start, end) !== piece.text) continue;
    const range = new Range();
    range.setStart(...placeOf(view.grown, start, false));
    range.setEnd(...placeOf(view.grown, end, true));
    const parts = shares(piece.p);
    const highlight = parts && CSS.highlights?.get(`mix-${parts.join("-")}`);
    highlight?.add(range);
    view.marks.push({ range, highlight, piece, start, end, n: view.n });
  }
}

function unpaint(turn) {
  for (const { range, highlight } of turn.view?.marks ?? []) highlight?.delete(range);
}

/** Forget the colours from a position on: what is there is written again. */
function unpaintFrom({ view }, position) {
  while (view.marks.at(-1)?.end > position) {
    const { range, highlight, start, n } = view.marks.pop();
    highlight?.delete(range);
    [view.n, view.covered] = [n, start];
  }
}
