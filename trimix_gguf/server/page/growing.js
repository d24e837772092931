// -- an answer's text in the page, as it grows ------------------------------------------------------

const SMALL = 2000; // characters of a block that is written again at each step
const SYNTAX = /[\\`*_~[\]()<>\r\n]/;

/** What of an answer is in its body: whole blocks, and from `open` on those that may still change. */
function nothingGrown() {
  return { length: 0, open: 0, node: null, written: 0, isRough: false, nodes: [], nWritten: 0 };
}

/** Bring the body up to a text that only grew; returns from where on it was written again.
 *
 * Only the open block is: where it is long, once it has grown by an eighth, and until then what
 * comes is put behind it as it is. So the work is in proportion to the length.
 */
function grow(view, text, isWhole) {
  const { body, grown } = view;
  const more = text.slice(grown.length);
  if (!more && !(isWhole && grown.isRough)) return text.length;
  const from = grown.length;
  grown.length = text.length;
  const size = text.length - grown.open;
  if (!grown.isRough && isPlain(view, text, more)) {
    grown.nodes.at(-1).node.appendData(more);
  } else if (!isWhole && size > SMALL && text.length - grown.written < size / 8) {
    grown.isRough = true;
    if (body.lastChild instanceof Text) {
      body.lastChild.appendData(more);
    } else {
      const node = document.createTextNode(more);
      body.append(node);
      grown.nodes.push({ node, start: from });
    }
  } else {
    return writeOpen(body, grown, text);
  }
  return from;
}

/** Whether what comes can only be more of the last text: within a line of a paragraph, or in code. */
function isPlain({ body, grown }, text, more) {
  const [tail, block] = [grown.nodes.at(-1)?.node, body.lastChild];
  const parent = tail?.parentElement;
  if (!tail || tail !== parent.lastChild || !(block instanceof Element)) return false;
  if ("open" in block.dataset) return parent.tagName === "CODE" && !/[`~]/.test(more);
  if (block !== parent || block.tagName !== "P" || SYNTAX.test(more)) return false;
  const before = text.slice(Math.max(grown.open, text.length - more.length - 200), text.length - more.length);
  const line = before.slice(before.lastIndexOf("\n") + 1);
  return line.length > 12 && /\p{L}/u.test(line) && !SYNTAX.test(line.at(-1));
}

function writeOpen(body, grown, text) {
  const from = grown.open;
  if (grown.node) {
    while (body.lastChild !== grown.node) body.lastChild.remove();
    body.lastChild.remove();
  } else {
    body.replaceChildren();
  }
  while (grown.nodes.at(-1)?.start >= from) grown.nodes.pop();
  const before = body.lastChild;
  const out = { source: text, blocks: [] };
  writeBlocks(out, body, linesOf(text, from));
  const first = before ? before.nextSibling : body.firstChild;
  let at = from;
  for (let child = first; child; child = child.nextSibling) {
    const words = document.createTreeWalker(child, NodeFilter.SHOW_TEXT);
    for (let node; (node = words.nextNode()); at += node.length) grown.nodes.push({ node, start: at });
  }
  // A block ends for good with the first whole line of the next one.
  const last = out.blocks.at(-1);
  const open = last?.isSure ? last : out.blocks.at(-2);
  [grown.open, grown.node] = open ? [open.at, open.node] : [from, first];
  grown.written = text.length;
  grown.nWritten += text.length - from;
  grown.isRough = false;
  return from;
}

/** The text node and offset of a position in the text; the end of a range is not in the next node. */
function placeOf({ nodes }, position, isEnd) {
  let [low, high] = [0, nodes.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (nodes[middle].start < position + !isEnd) low = middle;
    else high = middle - 1;
  }
  return [nodes[low].node, position - nodes[low].start];
}
