// -- why --------------------------------------------------------------------------------------------

function explain(turn) {
  const { mix } = turn.answer;
  const { alpha, beta, method } = mix.weights;
  const parts = [
    element("p", {}, say({ __proto__: null, auto: "byAuto", ppl: "byPpl", ent: "byEnt" }[method] ?? "byHand")),
    ...(mix.trio == null ? [] : [element("p", {}, say("answeredBy", { trio: mix.trio }))]),
    ...(mix.guard == null ? [] : [element("p", {}, say("guarded"))]),
    mixTable(mix, { large_ins: alpha, small_cpt: beta, small_base: 1 - alpha - beta }),
  ];
  if (mix.grid) parts.push(element("figure", {}, surface(mix), element("figcaption", {}, say("surface"))));
  if (turn.view.marks.length) parts.push(tokenSlider(turn));
  turn.view.why.lastChild.replaceChildren(...parts);
}

function mixTable({ perplexity }, weights) {
  const heads = ["model", "weight", ...(perplexity ? ["perplexity"] : [])];
  const cell = (value, format) => element("td", {}, element("bdi", {}, value == null ? "–" : format(value)));
  const rows = [...ROLES, "fused"].map((name) =>
    element("tr", { "data-name": name },
      element("th", { scope: "row" }, element("i", { class: `swatch ${name}`, hidden: name === "fused" ? "" : null }), say(name)),
      name === "fused" ? element("td") : cell(weights[name], weight),
      ...(perplexity ? [cell(perplexity[name], number)] : [])),
  );
  if (!perplexity) rows.pop();
  return element("table", {},
    element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, say(name))))),
    element("tbody", {}, ...rows));
}

/** The (alpha, beta) surface: alpha to the right, beta upwards, the stronger the lower. */
function surface({ grid, weights }) {
  const [size, left, top] = [34, 46, 8];
  const { alphas, betas, mean_nll: nll } = grid;
  const [right, bottom] = [left + size * alphas.length, top + size * betas.length];
  const known = nll.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const middle = (ticks, value) => (place(ticks, value) + 0.5) * size;
  const svg = element("svg", { viewBox: `0 0 ${right + 8} ${bottom + 40}`, role: "img", "aria-label": `${say("surface")} α = ${weight(weights.alpha)}, β = ${weight(weights.beta)}` });
  alphas.forEach((alpha, i) => {
    svg.append(element("text", { x: left + (i + 0.5) * size, y: bottom + 15, "text-anchor": "middle" }, weight(alpha)));
    betas.forEach((beta, j) => {
      const depth = nll[i][j] === null || high === low ? 1 : Math.sqrt((nll[i][j] - low) / (high - low));
      const told = nll[i][j] === null ? "–" : number(Math.exp(nll[i][j]));
      svg.append(element("rect", { class: "cell", "data-alpha": alpha, "data-beta": beta, x: left + i * size, y: bottom - (j + 1) * size, width: size - 1, height: size - 1, "fill-opacity": (1 - 0.93 * depth).toFixed(3) }, element("title", {}, `α = ${weight(alpha)}, β = ${weight(beta)}: ${told}`)));
    });
  });
  betas.forEach((beta, j) => svg.append(element("text", { x: left - 6, y: bottom - (j + 0.5) * size + 4, "text-anchor": "end" }, weight(beta))));
  const [cx, cy] = [left + middle(alphas, weights.alpha), bottom - middle(betas, weights.beta)];
  svg.append(
    element("text", { x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle" }, `α · ${say("large_ins_short")}`),
    element("text", { transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, `β · ${say("small_cpt_short")}`),
    element("g", { class: "chosen", "data-alpha": weights.alpha, "data-beta": weights.beta }, element("circle", { cx, cy, r: 10 }), element("circle", { cx, cy, r: 10 })));
  return svg;
}

/** Where a value stands among ticks, by their indices; between two of them in proportion. */
function place(ticks, value) {
  const above = ticks.findIndex((tick) => tick >= value);
  if (above <= 0) return above === 0 ? 0 : ticks.length - 1;
  return above - (ticks[above] - value) / (ticks[above] - ticks[above - 1]);
}

/** The same numbers as a slider, for users of screen readers, who do not see the colours. */
function tokenSlider(turn) {
  const { marks } = turn.view;
  const out = element("div", { "aria-hidden": "true" });
  const slider = element("input", { type: "range", min: 0, max: marks.length - 1, value: 0, step: 1 });
  const tell = () => {
    const { piece, range } = marks[slider.valueAsNumber];
    out.replaceChildren(...numbersTable(piece));
    slider.setAttribute("aria-valuetext", numbersText(piece));
    const current = CSS.highlights?.get("token");
    current?.clear();
    if (document.activeElement === slider) current?.add(range);
  };
  slider.addEventListener("input", tell);
  slider.addEventListener("focus", tell);
  slider.addEventListener("blur", stopInspecting);
  tell();
  return element("div", { class: "tokens" }, element("label", {}, say("tokens"), slider), out);
}
