function setLanguage(name) {
  language = name;
  document.documentElement.lang = name;
  document.documentElement.dir = TEXTS[name].dir;
  $("language").value = name;
  for (const part of document.querySelectorAll("[data-text]")) part.textContent = say(part.dataset.text);
  for (const part of document.querySelectorAll("[data-placeholder]")) part.placeholder = say(part.dataset.placeholder);
  for (const part of document.querySelectorAll("[data-label]")) part.setAttribute("aria-label", say(part.dataset.label));
  $("unreviewed").hidden = TEXTS[name].reviewed;
  showPrivacy();
  meet(chosenTrio());
  if (!("highlights" in CSS)) $("colours").title = say("noColours");
  $("card").hidden = true;
  setDirection($("question"));
  turns.filter((turn) => !turn.view?.root.querySelector(".edit")).forEach(show); // what is written there stays
}

function showPrivacy() {
  const here = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
  const where = say(here ? "privateHere" : "privateThere", { host: location.host });
  $("privacy").textContent = `${where} ${say(places().length > 1 ? "keptLong" : "keptShort")}`;
}

function firstLanguage() {
  const wanted = [recall("localStorage", "language"), ...navigator.languages.map((tag) => tag.split("-")[0])];
  return wanted.find((name) => name in TEXTS) ?? "en";
}

function setColours(on) {
  document.documentElement.classList.toggle("coloured", on);
  $("colours").checked = on;
}

function start() {
  prepareColours();
  $("colours").disabled = !("highlights" in CSS);
  setColours("highlights" in CSS && (recall("localStorage", "colours") ?? true));
  for (const [name, { name: own, dir }] of Object.entries(TEXTS)) $("language").append(element("option", { value: name, lang: name, dir }, own));
  settings = { ...settings, ...recall("sessionStorage", "settings") };
  ({ chat, turns } = kept(recall("sessionStorage", "current")) ?? { chat, turns });
  $("beside").checked = recall("localStorage", "beside") ?? false;
  setLanguage(firstLanguage());

  $("language").addEventListener("change", (event) => {
    remember("localStorage", "language", event.target.value);
    setLanguage(event.target.value);
  });
  $("trio").addEventListener("change", (event) => {
    remember("localStorage", "trio", event.target.value);
    meet(chosenTrio());
  });
  $("colours").addEventListener("change", (event) => {
    remember("localStorage", "colours", event.target.checked);
    setColours(event.target.checked);
  });
  $("beside").addEventListener("change", (event) => remember("localStorage", "beside", event.target.checked));
  $("new").addEventListener("click", newConversation);
  prepareChats();
  $("open-settings").addEventListener("click", openSettings);
  $("settings").addEventListener("change", enableFields);
  $("settings").addEventListener("input", (event) => { if (event.target.name === "system") setDirection(event.target); });
  $("settings").addEventListener("close", readSettings);
  $("key").querySelector("form").addEventListener("submit", takeKey);
  $("no-key").addEventListener("click", () => $("key").close());
  $("stop").addEventListener("click", () => running?.abort.abort());
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("input", fitQuestion);
  $("question").addEventListener("keydown", (event) => {
    if (isSend(event)) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stopInspecting(); });
  document.addEventListener("click", (event) => { if (!event.target.closest?.(".text")) stopInspecting(); });
  addEventListener("scroll", () => {
    $("card").hidden = true;
    follow = innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
  }, { passive: true });
  // The last event that a page surely gets: a telephone ends what is hidden.
  document.addEventListener("visibilitychange", () => { if (running) keepChat(); });
  writeQuestion(recall("sessionStorage", "draft") ?? "");
  $("question").focus();
  greet();
}

start();
