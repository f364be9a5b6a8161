/** Small helpers to build elements. Text is only ever set as text. */

export const $ = (id) => document.getElementById(id);

/**
 * Make an element. `on…` are listeners, `class`, `text`, `value`, `checked` are properties, anything
 * else is an attribute; undefined, null and false leave it out.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "value" || name === "checked") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** Return one of the drawings in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick, props = {}) {
  return el(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props },
    icon(name),
  );
}

/** Make `box` hold exactly `nodes`, moving no node that is in place: the focus stays. */
export function arrange(box, nodes) {
  nodes.forEach((node, i) => {
    if (box.children[i] !== node) box.insertBefore(node, box.children[i] ?? null);
  });
  while (box.children.length > nodes.length) box.lastElementChild.remove();
}

/** Whether Enter in a text field is meant as Enter, and not as a choice in an input method. */
export function isPlainEnter(event) {
  const composing = event.isComposing || event.keyCode === 229; // Safari says it only this way
  return event.key === "Enter" && !composing && !event.shiftKey && !event.altKey;
}

/** Let a text field be as tall as its text; CSS limits it. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text, class: "offscreen" }); // not over https
  const holder = document.querySelector("dialog[open]") ?? document.body;
  const focused = document.activeElement;
  holder.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!copied) throw new Error("copy");
}

export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID needs https
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
