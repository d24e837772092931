// -- settings, key, language ------------------------------------------------------------------------

function openSettings() {
  const fields = $("settings").querySelector("form").elements;
  for (const [name, value] of Object.entries(settings)) fields[name].value = value;
  setDirection(fields.system);
  enableFields();
  $("settings").showModal();
}

function enableFields() {
  const { mix } = $("settings").querySelector("form").elements;
  for (const part of document.querySelectorAll("[data-for]")) {
    part.hidden = part.dataset.for !== mix.value;
    for (const field of part.querySelectorAll("input, select")) field.disabled = part.hidden;
  }
}

/** Takes valid values; an invalid number changes nothing. */
function readSettings() {
  const fields = $("settings").querySelector("form").elements;
  for (const name of Object.keys(settings)) {
    const field = fields[name];
    if (field.disabled || (field.validity && !field.validity.valid)) continue;
    settings[name] = field.type === "number" && field.value !== "" ? field.valueAsNumber : field.value;
  }
  remember("sessionStorage", "settings", settings);
}

let afterKey = null;

function askKey(then) {
  afterKey = then;
  $("key-title").textContent = say(ownKey !== null ? "wrongKey" : "needsKey");
  if (!$("key").open) $("key").showModal();
}

function takeKey(event) {
  event.preventDefault();
  const field = event.target.elements.key;
  ownKey = field.value;
  remember("sessionStorage", "key", ownKey);
  field.value = "";
  $("key").close();
  afterKey?.();
}

async function greet() {
  try {
    const { data } = await (await request("v1/models")).json();
    models = data;
    trios = data.length > 1 ? data : []; // it may be another server than the last time
    $("trios").hidden = !trios.length;
    $("model").hidden = !$("trios").hidden;
    if (trios.length) {
      listTrios(data);
      return;
    }
    $("model").firstChild.textContent = data[0].id;
    serverWeights = data[0].trimix?.weights ?? null;
    meet(data[0]);
    if (serverWeights && !recall("sessionStorage", "settings")) {
      settings = { ...settings, alpha: serverWeights[0], beta: serverWeights[1], mix: "fixed" };
    }
  } catch (error) {
    if (error.failure === "needsKey") askKey(greet);
    // Any other fault is shown when a question is sent.
  }
}

/** Show what is known of the trio that answers; null where each question finds its own. */
function meet(model) {
  const { tuning, description } = model?.trimix ?? {};
  $("described").hidden = !description;
  $("described").textContent = description ? `${model.id}: ${description}` : "";
  $("tuned").hidden = model === null || Boolean(model.trimix?.weights);
  $("tuned").textContent = tuning ? tuning.verdict : say("untuned");
  showExamples(model);
}

/** Questions to begin with, in the trio's language if that is known, else in the page's. */
function showExamples(model) {
  const codes = (model?.trimix?.languages ?? []).map((code) => code.split(/[-_]/)[0]);
  const code = codes.find((code) => code in TEXTS) ?? language;
  const questions = TEXTS[code].examples.map((question) => element("li", {},
    element("button", { type: "button", lang: code, dir: TEXTS[code].dir, click: () => { writeQuestion(question); $("question").focus(); } }, question)));
  $("examples").replaceChildren(...questions);
}

function listTrios(data) {
  const options = data.map(({ id, trimix }) => element("option", { value: id, dir: "auto" }, trioName(id, trimix?.languages ?? [])));
  $("trio").replaceChildren(element("option", { value: "auto", "data-text": "byLetters" }, say("byLetters")), ...options);
  const kept = recall("localStorage", "trio");
  $("trio").value = data.some(({ id }) => id === kept) ? kept : "auto";
  meet(chosenTrio());
}

/** The trio that answers; null where each question finds its own, or it is not known yet. */
function chosenTrio() {
  return (trios.length ? trios.find(({ id }) => id === $("trio").value) : models[0]) ?? null;
}

/** Its languages by their own names, as far as the browser knows them, and the trio's name. */
function trioName(id, languages) {
  const names = languages.map((code) => {
    if (code in TEXTS) return TEXTS[code].name;
    try { return new Intl.DisplayNames([code], { type: "language" }).of(code); } catch { return code; }
  });
  return names.length ? `${names.join(", ")} (${id})` : id;
}
