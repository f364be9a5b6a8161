/** Shows what a model wants from tools, and takes their results. Nothing is ever run. */

import { el, fitHeight, icon, isPlainEnter } from "./dom.js";
import { t } from "./i18n.js";

/** Return a block for a call; `onresult(text)` is there while its result is missing. */
export function callBlock(call, onresult) {
  const block = el("div", { class: "tool" }, fold("toolCall", call.name, pretty(call.arguments)));
  if (onresult) block.append(resultForm(call, onresult));
  return block;
}

export function resultBlock({ name = "", content }) {
  return el("div", { class: "tool" }, fold("toolAnswer", name, pretty(content)));
}

function fold(title, name, text) {
  return el(
    "details",
    {},
    el("summary", {}, icon("tool"), el("span", { text: t(title, { name }) }), icon("down")),
    el("pre", { class: "plain-code", text }),
  );
}

function resultForm(call, onresult) {
  const area = el("textarea", {
    rows: "2",
    "aria-label": `${t("addResult")}: ${call.name}`,
    placeholder: t("resultPlaceholder"),
    oninput: () => fitHeight(area),
    onkeydown: (event) => {
      if (isPlainEnter(event)) submit(event);
    },
  });
  const button = el("button", { type: "submit", class: "button", text: t("sendResult") });
  return el("form", { class: "tool-form", onsubmit: submit }, area, button);

  function submit(event) {
    event.preventDefault();
    if (area.value.trim()) onresult(area.value);
  }
}

/** JSON with line breaks, anything else as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
