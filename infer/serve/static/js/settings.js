/** The settings: every change counts at once. */

import { addConversations, app, keepCurrent, removeConversations } from "./app.js";
import { parseTools } from "./conversation.js";
import { $, el, fitHeight } from "./dom.js";
import { setLanguage, t } from "./i18n.js";
import { askForKey } from "./key.js";
import { CONTROLS, isValid } from "./sampling.js";
import { preferences, session } from "./store.js";
import { exportConversations, importConversations } from "./transfer.js";

/** `redraw` shows the page in another language. */
export function startSettings(redraw) {
  $("settings-open").addEventListener("click", () => {
    drawSettings();
    $("settings").showModal();
    fitHeight($("system"));
    fitHeight($("tools"));
  });
  $("settings").addEventListener("click", (event) => {
    if (event.target === event.currentTarget) $("settings").close(); // beside the panel
  });
  $("system").addEventListener("input", () => {
    fitHeight($("system"));
    app.current.system = $("system").value;
  });
  $("system").addEventListener("change", keepCurrent);
  $("tools").addEventListener("input", changeTools);
  $("tools").addEventListener("change", keepCurrent);
  $("sampling-reset").addEventListener("click", () => {
    setSampling({});
    drawSampling();
  });
  startAppearance(redraw);
  startData();
}

function startAppearance(redraw) {
  $("language").addEventListener("change", ({ target }) => {
    preferences.set("language", target.value);
    setLanguage(target.value);
    redraw();
    drawSettings();
  });
  $("theme").addEventListener("change", ({ target }) => {
    preferences.set("theme", target.value);
    document.documentElement.dataset.theme = target.value;
  });
}

function startData() {
  $("key-change").addEventListener("click", () => askForKey(false).then(drawKey));
  $("key-forget").addEventListener("click", () => {
    session.set("key", "");
    drawKey();
    $("key-change").focus();
  });
  $("export").addEventListener("click", () => exportConversations([...app.conversations.values()]));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", ({ target }) => {
    if (target.files[0]) bringIn(target.files[0]);
    target.value = "";
  });
  $("delete-all").addEventListener("click", () => {
    $("settings").close();
    removeConversations([...app.conversations.values()]);
  });
}

async function bringIn(file) {
  try {
    const added = await importConversations(file, app.conversations);
    await addConversations(added);
    $("data-status").textContent = t("imported", { n: added.length });
  } catch (error) {
    $("data-status").textContent = t("importBad", { text: error.message });
  }
  drawData();
}

function drawSettings() {
  $("system").value = app.current.system;
  $("tools").value = app.current.tools;
  $("tools-fold").open = Boolean(app.current.tools);
  $("tools-complaint").textContent = "";
  $("data-status").textContent = "";
  $("language").value = preferences.get("language", "auto");
  $("theme").value = preferences.get("theme", "auto");
  drawSampling();
  drawKey();
  drawData();
}

function changeTools() {
  fitHeight($("tools"));
  const text = $("tools").value;
  let complaint = "";
  try {
    parseTools(text);
    app.current.tools = text.trim();
  } catch (error) {
    complaint = t("toolsBad", { text: error.message });
  }
  $("tools-complaint").textContent = complaint;
  $("tools").setAttribute("aria-invalid", Boolean(complaint));
}

function setSampling(sampling) {
  app.current.sampling = sampling;
  preferences.set("sampling", sampling);
  keepCurrent();
}

function drawSampling() {
  $("sampling").replaceChildren(...CONTROLS.map(controlField));
}

function controlField(control) {
  const { name, min, max, step = 1, whole } = control;
  const complaint = el("span", { class: "complaint", id: `${name}-complaint`, role: "alert" });
  const field = el("input", {
    type: "number",
    id: `control-${name}`,
    "aria-describedby": `${name}-hint ${name}-complaint`,
    min,
    max,
    step,
    inputmode: "decimal",
    placeholder: t("byServer"),
    autocomplete: "off",
    value: app.current.sampling[name] ?? "",
    onchange: change,
  });
  return el(
    "div",
    { class: "control" },
    el("label", { for: field.id, text: t(name) }),
    field,
    el("span", { class: "faint", id: `${name}-hint`, text: t(`${name}Hint`) }),
    complaint,
  );

  function change() {
    const { [name]: old, ...sampling } = app.current.sampling;
    const value = field.valueAsNumber;
    const empty = field.value === "" && !field.validity.badInput;
    const right = empty || isValid(control, value);
    field.setAttribute("aria-invalid", !right);
    const words = whole ? "outOfRangeWhole" : "outOfRange";
    complaint.textContent = right ? "" : t(words, { name: t(name), min, max });
    if (right) setSampling(empty ? sampling : { ...sampling, [name]: value });
  }
}

function drawKey() {
  const set = Boolean(session.get("key"));
  $("key-state").textContent = t(set ? "keySet" : "keyNone");
  $("key-forget").hidden = !set;
}

function drawData() {
  $("export").disabled = $("delete-all").disabled = !app.conversations.size;
}
