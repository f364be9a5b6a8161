/** Where messages are written. */

import { app, currentModel, on, running, send, stop } from "./app.js";
import { path } from "./conversation.js";
import { $, fitHeight, isPlainEnter } from "./dom.js";
import { t } from "./i18n.js";
import { session } from "./store.js";

let shown = null; // id of the conversation whose draft is in the field
const draftKey = () => `draft ${app.current.messages.length ? app.current.id : "new"}`;

export function startComposer() {
  const field = $("input");
  field.addEventListener("input", changed);
  field.addEventListener("keydown", (event) => {
    if (!isPlainEnter(event)) return;
    event.preventDefault();
    submit();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running()) stop();
    else submit();
  });
  document.addEventListener("keydown", (event) => {
    const busy = document.querySelector("dialog[open]") || event.isComposing;
    if (event.key === "Escape" && !event.defaultPrevented && !busy) stop();
  });
  on("chat", drawComposer);
  on("models", drawComposer);
}

const hasPointer = () => matchMedia("(hover: hover)").matches;

/** On a phone the focus would bring up the keyboard. */
export function focusComposer() {
  if (hasPointer()) $("input").focus();
}

export function fillComposer(text) {
  $("input").value = text;
  $("input").focus();
  changed();
}

function submit() {
  const text = $("input").value;
  if (!text.trim() || running()) return;
  $("input").value = "";
  changed();
  send(text);
}

function changed() {
  fitHeight($("input"));
  session.set(draftKey(), $("input").value);
  drawComposer();
}

export function drawComposer() {
  const field = $("input");
  if (shown !== app.current.id) {
    shown = app.current.id;
    field.value = session.get(draftKey(), "");
    fitHeight(field);
  }
  const going = Boolean(running());
  const button = $("send");
  button.classList.toggle("stop", going);
  button.setAttribute("aria-label", t(going ? "stop" : "send"));
  button.title = t(going ? "stop" : "send");
  button.querySelector("use").setAttribute("href", going ? "#i-stop" : "#i-send");
  button.disabled = !going && !field.value.trim();
  const used = path(app.current).findLast(({ usage }) => usage && !usage.approximate)?.usage;
  const limit = currentModel()?.max_model_len;
  const keys = hasPointer() ? t("keys") : "";
  $("context").textContent =
    used && limit ? t("context", { used: used.prompt + used.completion, limit }) : keys;
}
