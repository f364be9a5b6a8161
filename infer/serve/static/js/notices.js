/** What the page says in passing: short notices, words for screen readers, "copied". */

import { $, copyText, el, icon, iconButton } from "./dom.js";
import { t } from "./i18n.js";

const SPOKEN = 20; // paragraphs that stay for a screen reader to go back to

/** Have a screen reader say a text when it is done with what it says now. */
export function say(text) {
  const box = $("spoken");
  box.append(el("p", { text }));
  while (box.children.length > SPOKEN) box.firstElementChild.remove();
}

/** Show a notice for some seconds, with one thing to do about it. */
export function notify(text, { action, onaction, seconds = 8 } = {}) {
  const close = () => notice.remove();
  const button =
    action &&
    el("button", {
      type: "button",
      class: "text-button",
      text: action,
      onclick: () => {
        close();
        onaction();
      },
    });
  const notice = el(
    "div",
    { class: "notice" },
    el("span", { text }),
    button,
    iconButton("close", t("close"), close),
  );
  $("notices").append(notice);
  const wait = () =>
    setTimeout(() => (notice.matches(":hover, :focus-within") ? wait() : close()), seconds * 1000);
  wait();
}

/** Return a button that copies what `text()` returns, and says so. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    try {
      await copyText(text());
    } catch {
      notify(t("copyFailed"));
      return;
    }
    say(t("copied"));
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}
