// -- Markdown by lines: headings, lists, tables, quotes, code, rules --------------------------------
// A line is {start, from, end} in the source: what is before `from` belongs to what is around it.

const MOST_NESTED = 6;
const MOST_COLUMNS = 40;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const FENCE_END = /^ {0,3}(`{3,}|~{3,})[ \t]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^ {0,3}(?:[-*+]|(\d{1,4})[.)])(?:[ \t]+|$)/;
const ROW = /^ {0,3}\|/;

function linesOf(source, at) {
  const lines = [];
  for (let end; at < source.length; at = end) {
    end = source.indexOf("\n", at) + 1 || source.length;
    lines.push({ start: at, from: at, end });
  }
  return lines;
}

/** What a line says, without the end of the line. */
function lineText(source, { from, end }) {
  return source.slice(from, end).replace(/\r?\n?$/, "");
}

function kindOf(line, depth) {
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (ROW.test(line)) return "table";
  if (depth < MOST_NESTED && QUOTE.test(line)) return "quote";
  return depth < MOST_NESTED && ITEM.test(line) ? "list" : "text";
}

/** Write lines as blocks; `out.blocks` takes where each of the outermost ones begins. */
function writeBlocks(out, parent, lines, depth = 0) {
  const said = lines.map((line) => lineText(out.source, line));
  for (let i = 0; i < lines.length; ) {
    if (!said[i].trim()) {
      const n = countWhile(said, i, (line) => !line.trim());
      write(parent, out.source.slice(lines[i].start, lines[i + n - 1].end), true);
      i += n;
      continue;
    }
    const kind = kindOf(said[i], depth);
    const n = (LENGTHS[kind] ?? (() => 1))(said, i, depth);
    const node = WRITERS[kind](out, lines.slice(i, i + n), said.slice(i, i + n), depth);
    parent.append(node);
    if (depth === 0) out.blocks.push({ at: lines[i].start, node, isSure: out.source[lines[i].end - 1] === "\n" });
    i += n;
  }
}

// How many lines a block has, from its first.
const LENGTHS = {
  code(said, i) {
    const sign = said[i].match(FENCE)[1];
    const n = countWhile(said, i, (line) => !line.match(FENCE_END)?.[1].startsWith(sign));
    return Math.min(n + 1, said.length - i); // with its end, where that has come
  },
  table: (said, i, depth) => countWhile(said, i, (line) => kindOf(line, depth) === "table"),
  quote: (said, i, depth) => countWhile(said, i, (line) => kindOf(line, depth) === "quote"),
  text: (said, i, depth) => countWhile(said, i, (line) => line.trim() && goesOn(line, depth)),
  list(said, i, depth) {
    const [isOrdered, base] = [isNumbered(said[i]), indentOf(said[i])];
    let [n, nBlank] = [1, 0];
    for (let j = i + 1; j < said.length; j++) {
      if (!said[j].trim()) {
        nBlank++;
        continue;
      }
      const kind = kindOf(said[j], depth);
      const isItem = kind === "list" && isNumbered(said[j]) === isOrdered;
      if (!(indentOf(said[j]) >= base + 2 || isItem || (kind === "text" && !nBlank))) break;
      n = j + 1 - i;
      nBlank = 0;
    }
    return n;
  },
};

function directionOf({ source }, lines) {
  return direction(source.slice(lines[0].from, lines.at(-1).end));
}

function countWhile(said, i, holds) {
  let n = 1;
  while (i + n < said.length && holds(said[i + n])) n++;
  return n;
}

/** Whether a line belongs to the text before it: "1985. " at its start is no list there. */
function goesOn(line, depth) {
  const kind = kindOf(line, depth);
  return kind === "text" || (kind === "list" && !["1", undefined].includes(line.match(ITEM)[1]));
}

function isNumbered(line) {
  return line.match(ITEM)[1] !== undefined;
}

function indentOf(line) {
  const blank = line.match(/^[ \t]*/)[0];
  return blank.length + 3 * (blank.split("\t").length - 1);
}

const WRITERS = {
  text(out, lines) {
    return writeLines(out, element("p"), lines);
  },
  heading(out, [line], [said]) {
    const [marks, { length: level }] = said.match(HEADING);
    return writeLines(out, element("h3", { class: `level-${level}` }), [{ ...line, from: line.from + marks.length }]);
  },
  rule(out, [line]) {
    const block = element("div", {}, element("hr"));
    write(block, out.source.slice(line.start, line.end), true);
    return block;
  },
  quote(out, lines, said, depth) {
    const quote = element("blockquote", { dir: directionOf(out, lines) });
    writeBlocks(out, quote, lines.map((line, i) => ({ ...line, from: line.from + said[i].match(QUOTE)[0].length })), depth + 1);
    return quote;
  },
  code(out, lines, said) {
    const sign = said[0].match(FENCE)[1];
    const isOpen = lines.length === 1 || !said.at(-1).match(FENCE_END)?.[1].startsWith(sign);
    const code = element("code");
    const copy = element("button", { type: "button", class: "quiet copy", "aria-label": say("copyCode"), click: () => copyCode(code, copy) });
    const block = element("div", { class: "code", dir: "ltr", "data-open": isOpen ? "" : null });
    write(block, out.source.slice(lines[0].start, lines[0].end), true);
    block.append(copy, element("pre", {}, code));
    const { text, put } = textOfLines(out.source, lines.slice(1, isOpen ? lines.length : -1));
    put(code, 0, text.length);
    if (!isOpen) write(block, out.source.slice(lines.at(-1).start, lines.at(-1).end), true);
    return block;
  },
  list(out, lines, said, depth) {
    const [first, base] = [said[0].match(ITEM), indentOf(said[0])];
    const list = element(first[1] === undefined ? "ul" : "ol", { dir: directionOf(out, lines), start: first[1] && first[1] !== "1" ? Number(first[1]) : null });
    let [items, width] = [[], 0];
    lines.forEach((line, i) => {
      const item = indentOf(said[i]) < base + 2 && kindOf(said[i], depth) === "list" ? said[i].match(ITEM) : null;
      if (item) {
        items.push([]);
        width = item[0].length;
      }
      const n = item ? width : said[i].match(/^[ \t]*/)[0].slice(0, width).length;
      items.at(-1).push({ ...line, from: line.from + n });
    });
    for (const own of items) {
      const item = element("li");
      list.append(item);
      writeBlocks(out, item, own, depth + 1);
    }
    return list;
  },
  table(out, lines, said) {
    const cells = said.slice(0, 2).map(cellsOf);
    const n = cells[0].length;
    const isTable = lines.length > 1 && n > 0 && n <= MOST_COLUMNS && cells[1].length === n && cells[1].every(([from, to]) => /^[ \t]*:?-+:?[ \t]*$/.test(said[1].slice(from, to)));
    if (!isTable) return WRITERS.text(out, lines);
    const head = tableRow(out, lines[0], said[0], n, "th");
    write(head.lastChild, out.source.slice(lines[1].start, lines[1].end), true);
    const rows = lines.slice(2).map((line, i) => tableRow(out, line, said[i + 2], n, "td"));
    const table = element("table", { dir: directionOf(out, lines) }, element("thead", {}, head), ...(rows.length ? [element("tbody", {}, ...rows)] : []));
    return element("div", { class: "wide", tabindex: n > 3 ? 0 : null }, table);
  },
};

/** Write the text of lines into a block; the end of the last line is hidden. */
function writeLines(out, block, lines) {
  const last = lines.at(-1);
  const end = last.from + lineText(out.source, last).length;
  writeInline(block, out.source, [...lines.slice(0, -1), { ...last, end }]);
  write(block, out.source.slice(end, last.end), true);
  return block;
}

/** [from, to] of the cells of a row, between its bars. */
function cellsOf(said) {
  const bars = [...said.matchAll(/\\.|\|/g)].filter(([sign]) => sign === "|").map(({ index }) => index);
  const cells = bars.map((bar, i) => [bar + 1, bars[i + 1] ?? said.length]);
  if (!said.slice(...cells.at(-1)).trim()) cells.pop();
  return cells;
}

function tableRow(out, line, said, n, tag) {
  const cells = cellsOf(said);
  const row = element("tr");
  let at = line.start;
  for (let i = 0; i < n; i++) {
    const cell = element(tag, { scope: tag === "th" ? "col" : null });
    row.append(cell);
    if (!cells[i]) continue;
    const [from, to] = [cells[i][0], i === n - 1 ? cells.at(-1)[1] : cells[i][1]]; // what is too much is in the last
    const text = said.slice(from, to);
    const start = line.from + from + (text.length - text.trimStart().length);
    const end = Math.max(start, line.from + from + text.trimEnd().length);
    write(cell, out.source.slice(at, start), true);
    writeInline(cell, out.source, [{ start, from: start, end }]);
    at = end;
  }
  write(row.lastChild, out.source.slice(at, line.end), true);
  return row;
}

function copyCode(code, button) {
  const text = [...code.childNodes].filter((node) => node instanceof Text).map((node) => node.data).join("");
  copyText(text, button);
}
