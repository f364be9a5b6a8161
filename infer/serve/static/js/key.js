/** Asks for the API key, in a dialog. */

import { $ } from "./dom.js";
import { t } from "./i18n.js";
import { session } from "./store.js";

let asking = null;

/** Ask for a key that the server `wants`, or the user; resolves to whether there is a new one. */
export function askForKey(wants) {
  asking ??= ask(wants).finally(() => (asking = null));
  return asking;
}

function ask(wants) {
  const dialog = $("key-dialog");
  const field = $("key-field");
  const complaint = $("key-complaint");
  field.value = "";
  complaint.textContent = wants ? t(session.get("key") ? "keyRejected" : "errKey") : "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "use");
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      const key = field.value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) {
        complaint.textContent = t("keyBad");
        return field.focus();
      }
      session.set("key", key);
      dialog.close("use");
    };
  });
}
