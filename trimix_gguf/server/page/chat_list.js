// -- the list of chats ------------------------------------------------------------------------------

function openChats() {
  keepChat();
  $("chats-note").textContent = "";
  $("keep").checked = places().length > 1;
  listChats();
  $("chats").showModal();
  placeUndo();
}

function listChats() {
  const all = keptIds().map(kept).filter(Boolean);
  all.sort((a, b) => b.chat.time - a.chat.time);
  $("chat-list").replaceChildren(...all.map(chatRow));
  $("no-chats").hidden = all.length > 0;
  for (const id of ["export-all", "delete-all"]) $(id).disabled = all.length === 0;
}

function chatRow(entry) {
  const { id, time } = entry.chat;
  const title = titleOf(entry);
  const date = new Intl.DateTimeFormat([language, "en"], { dateStyle: "medium", timeStyle: "short" }).format(time);
  const row = element("li", {});
  const open = element("button", { type: "button", class: "quiet title", dir: "auto", "aria-current": id === chat.id ? "true" : null, click: () => {
    $("chats").close();
    if (id !== chat.id) openChat(kept(id) ?? entry);
  } }, title);
  const act = (name, action) => {
    const made = button(name, action);
    made.setAttribute("aria-label", `${say(name)}: ${title}`);
    return made;
  };
  row.append(open, element("small", {}, date), element("span", { class: "actions" },
    act("rename", () => renameChat(entry, row)),
    act("export", () => exportChats([id])),
    act("delete", () => { deleteChats([id], "deleted", { title }); focusList(); })));
  return row;
}

/** Where the focus goes when the row that had it is gone. */
function focusList() {
  ($("undone").hidden ? $("chats-done") : $("undo")).focus();
}

function renameChat(entry, row) {
  const field = element("input", { type: "text", dir: "auto", maxlength: 200, "aria-label": say("chatTitle") });
  field.value = titleOf(entry);
  const close = () => { listChats(); $("chats-done").focus(); };
  const form = element("form", { class: "rename", submit: (event) => {
    event.preventDefault();
    const title = field.value.trim();
    if (entry.chat.id === chat.id) chat.title = title;
    const saved = JSON.parse(keptText(entry.chat.id) ?? packed(entry.chat, entry.turns)); // it may have grown
    keep(entry.chat.id, JSON.stringify({ ...saved, title }));
    close();
  }, keydown: (event) => {
    if (event.key !== "Escape" || isComposed(event)) return;
    event.preventDefault(); // or the list would be closed
    close();
  } }, field, element("button", { class: "main" }, say("done")), button("cancel", close, ""));
  row.replaceChildren(form);
  field.select();
}

async function takeFile(field) {
  const [file] = field.files;
  if (!file) return;
  const said = await importChats(file);
  field.value = "";
  listChats();
  $("chats-note").textContent = said;
}

function prepareChats() {
  $("open-chats").addEventListener("click", openChats);
  $("chats").addEventListener("close", placeUndo);
  $("chats-done").addEventListener("click", () => $("chats").close());
  $("export-all").addEventListener("click", () => exportChats(keptIds()));
  $("delete-all").addEventListener("click", () => { deleteChats(keptIds(), "deletedAll"); focusList(); });
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", (event) => takeFile(event.target));
  $("keep").addEventListener("change", (event) => moveChats(event.target.checked));
  $("undo").addEventListener("click", () => {
    const action = undo;
    forgetUndo();
    action?.();
    ($("chats").open ? $("chats-done") : $("question")).focus();
  });
  // Another tab may go on with the same chat, or delete some.
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(CHAT_KEY)) return;
    if ($("chats").open && !document.querySelector(".rename")) listChats();
    const found = key === CHAT_KEY + chat.id && newValue && !running && !document.querySelector(".edit") ? kept(chat.id) : null;
    if (found) enterChat(found);
  });
}
