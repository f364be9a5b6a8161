/** The messages of the current conversation, or a greeting. */

import { app, currentModel, loadModels, on, running } from "./app.js";
import { fillComposer } from "./composer.js";
import { path } from "./conversation.js";
import { $, arrange, el } from "./dom.js";
import { join, t } from "./i18n.js";
import { MessageView } from "./message.js";
import { problemOf } from "./problem.js";
import { Follower } from "./scroll.js";

const IDLE = 3; // for each ms of drawing, so many ms in between: a long answer never fills the CPU

let views = new Map();
let shown = null; // the conversation
let follower;
let waiting = false;
let notBefore = 0;

export function startThread() {
  follower = new Follower($("messages"), $("jump"));
  on("chat", draw);
  on("models", drawBanner);
  on("step", schedule);
  setInterval(() => running() && schedule(), 1000); // seconds of waiting are counted
}

/** Draw everything again, in another language. */
export function redrawThread() {
  views = new Map();
  $("thread").replaceChildren();
  drawBanner();
  draw();
}

function draw() {
  const moved = shown !== app.current;
  if (moved) views = new Map();
  shown = app.current;
  const messages = path(app.current);
  const nodes = messages.map((message) => {
    if (!views.has(message.id)) views.set(message.id, new MessageView(message));
    const view = views.get(message.id);
    view.message = message; // another tab may have stored a newer one
    view.update();
    return view.node;
  });
  const { system } = app.current;
  const focused = document.activeElement?.dataset?.step;
  arrange(
    $("thread"),
    messages.length ? [...(system ? [systemBlock(system)] : []), ...nodes] : [greeting()],
  );
  if (focused && !document.activeElement?.dataset?.step) refocus(messages, focused);
  $("messages").classList.toggle("empty", !messages.length);
  $("title").textContent = app.current.title || t("untitled");
  document.title = app.current.title ? `${app.current.title} · ${t("app")}` : t("app");
  if (moved || running()?.deltas === 0) follower.jump();
  else follower.follow();
}

/** After a step to another version the focus stays on the same button, or its neighbour. */
function refocus(messages, step) {
  const bars = messages
    .map(({ id }) => views.get(id).bar)
    .filter((bar) => bar.querySelector(".versions"));
  const buttons = [...(bars.at(-1)?.querySelectorAll("[data-step]") ?? [])];
  const same = buttons.find((button) => button.dataset.step === step && !button.disabled);
  (same ?? buttons.find((button) => !button.disabled))?.focus();
}

function schedule() {
  if (waiting) return;
  waiting = true;
  setTimeout(() => requestAnimationFrame(step), Math.max(notBefore - performance.now(), 0));
}

function step() {
  waiting = false;
  const going = running();
  const view = going && views.get(going.message.id);
  if (!view) return;
  const start = performance.now();
  view.step(going);
  follower.follow();
  const end = performance.now();
  notBefore = end + IDLE * (end - start);
}

function systemBlock(text) {
  const old = $("thread").querySelector(".system");
  if (old?.lastChild.textContent === text) return old; // open, or with the focus
  return el(
    "details",
    { class: "system" },
    el("summary", { text: t("systemPrompt") }),
    el("p", { class: "plain", text }),
  );
}

function greeting() {
  const model = currentModel()?.id;
  const tries = ["try1", "try2", "try3", "try4"].map((key) =>
    el(
      "button",
      { type: "button", class: "try", onclick: () => fillComposer(t(`${key}Text`)) },
      el("strong", { text: t(key) }),
      el("span", { text: t(`${key}Text`).trim() }),
    ),
  );
  return el(
    "div",
    { class: "greeting" },
    el("h2", { text: t("greeting") }),
    el("p", { text: model ? t("greetingHint", { model }) : "" }),
    el("div", { class: "tries" }, ...tries),
  );
}

/** Say why no models are known. */
function drawBanner() {
  const { modelsError } = app;
  $("banner").hidden = !modelsError;
  if (!modelsError) return;
  const isKey = modelsError.kind === "key";
  const [what, ...more] = problemOf(modelsError);
  $("banner").replaceChildren(
    el("p", {}, el("strong", { text: what }), ` ${join(more)}`),
    el("button", {
      type: "button",
      class: "button",
      text: t(isKey ? "enterKey" : "retry"),
      onclick: loadModels,
    }),
  );
}
