/** The list of conversations. */

import { app, newChat, on, openConversation, removeConversations, rename } from "./app.js";
import { focusComposer } from "./composer.js";
import { $, arrange, el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { preferences } from "./store.js";
import { exportConversations } from "./transfer.js";

const DAY = 24 * 60 * 60 * 1000;
const narrow = matchMedia("(max-width: 760px)");

export function startSidebar() {
  $("new-chat").addEventListener("click", begin);
  $("new-chat-top").addEventListener("click", begin);
  $("search").addEventListener("input", drawSidebar);
  $("sidebar-toggle").addEventListener("click", () => toggle(!isOpen()));
  $("sidebar-close").addEventListener("click", () => toggle(false));
  $("shade").addEventListener("click", () => toggle(false));
  $("sidebar").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !narrow.matches || !isOpen()) return;
    event.preventDefault(); // does not stop the answer, too
    toggle(false);
  });
  narrow.addEventListener("change", place);
  on("list", drawSidebar);
  place();
}

function begin() {
  newChat();
  if (narrow.matches) toggle(false);
  $("input").focus();
}

const isOpen = () => !$("sidebar").hidden;

function place() {
  toggle(!narrow.matches && preferences.get("sidebar", "open") === "open", false);
}

/** On a phone the list lies over the messages, which cannot be reached meanwhile. */
function toggle(open, chosen = true) {
  $("sidebar").hidden = !open;
  $("shade").hidden = !(open && narrow.matches);
  $("main").inert = open && narrow.matches;
  $("sidebar-toggle").setAttribute("aria-expanded", open);
  labelToggle();
  if (!chosen) return;
  if (!narrow.matches) preferences.set("sidebar", open ? "open" : "closed");
  (open ? $("new-chat") : $("sidebar-toggle")).focus();
}

function labelToggle() {
  const label = t(isOpen() ? "hideSidebar" : "showSidebar");
  $("sidebar-toggle").setAttribute("aria-label", label);
  $("sidebar-toggle").title = label;
}

export function drawSidebar() {
  labelToggle();
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [...app.conversations.values()]
    .filter((conversation) => words.every((word) => has(conversation, word)))
    .sort((a, b) => b.updated - a.updated);
  const groups = Map.groupBy(found, ({ updated }) => age(updated));
  const nodes = [...groups].map(([name, conversations]) =>
    el(
      "section",
      {},
      el("h2", { text: t(name) }),
      el("ul", {}, ...conversations.map((conversation) => entry(conversation))),
    ),
  );
  const empty = app.conversations.size ? "noMatch" : "noneYet";
  if (!nodes.length) nodes.push(el("p", { class: "faint", text: t(empty) }));
  const focused = document.activeElement?.closest("#list [data-id]")?.dataset.id;
  arrange($("list"), nodes);
  if (focused) (find(focused) ?? $("list").querySelector(".open") ?? $("new-chat")).focus();
}

const find = (id) => $("list").querySelector(`[data-id="${CSS.escape(id)}"] .open`);

function has({ title, messages }, word) {
  return [title, ...messages.map(({ content }) => content)].some((text) =>
    text.toLowerCase().includes(word),
  );
}

function age(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "today";
  if (time >= midnight - DAY) return "yesterday";
  return time >= midnight - 7 * DAY ? "lastWeek" : "earlier";
}

function entry(conversation) {
  const { id } = conversation;
  const title = conversation.title || t("untitled");
  const current = id === app.current.id;
  const open = el("button", {
    type: "button",
    class: "open",
    "aria-current": current && "page",
    text: title,
    title,
    onclick: () => {
      openConversation(conversation);
      if (narrow.matches) toggle(false);
      else focusComposer();
    },
  });
  const item = el(
    "li",
    { "data-id": id, class: current ? "entry current" : "entry" },
    open,
    app.answers.has(id)
      ? el("span", { class: "pulse", role: "img", "aria-label": t("answering") })
      : null,
    el(
      "span",
      { class: "entry-actions" },
      iconButton("edit", t("renameNamed", { title }), () => renameIn(item, conversation)),
      iconButton("download", t("exportNamed", { title }), () =>
        exportConversations([conversation]),
      ),
      iconButton("trash", t("deleteNamed", { title }), () => removeConversations([conversation])),
    ),
  );
  return item;
}

function renameIn(item, conversation) {
  let done = false;
  const field = el("input", {
    class: "rename",
    "aria-label": t("titleLabel"),
    value: conversation.title,
    maxlength: "200",
    onkeydown: (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      leave(event.key === "Enter");
      find(conversation.id)?.focus();
    },
    onblur: () => leave(true),
  });
  item.replaceChildren(field);
  field.select();

  function leave(keep) {
    if (done) return;
    done = true;
    if (keep) rename(conversation, field.value);
    drawSidebar();
  }
}
