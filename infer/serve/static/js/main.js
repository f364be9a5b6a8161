/** Starts the page. */

import { app, chooseModel, currentModel, on, start } from "./app.js";
import { drawComposer, focusComposer, startComposer } from "./composer.js";
import { $, el } from "./dom.js";
import { setLanguage, t } from "./i18n.js";
import { startSettings } from "./settings.js";
import { drawSidebar, startSidebar } from "./sidebar.js";
import { preferences } from "./store.js";
import { redrawThread, startThread } from "./thread.js";

function drawModels() {
  const options = app.models.map(({ id, parent }) =>
    el("option", { value: id, text: parent ? t("adapterOf", { model: id }) : id }),
  );
  if (!options.length) options.push(el("option", { text: t("noModels") }));
  $("model").replaceChildren(...options);
  $("model").disabled = !app.models.length;
  if (app.models.length) $("model").value = currentModel().id;
}

function redraw() {
  drawModels();
  drawSidebar();
  redrawThread();
  drawComposer();
}

setLanguage(preferences.get("language", "auto"));
startSidebar();
startThread();
startComposer();
startSettings(redraw);
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
$("model").addEventListener("change", ({ target }) => chooseModel(target.value));
on("models", drawModels);
redraw();
focusComposer();
await start();
document.documentElement.dataset.ready = "yes";
