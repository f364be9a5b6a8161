/** Says an ApiError in words: what happened, why, and what to do. */

import { TRIES } from "./answer.js";
import { t } from "./i18n.js";

const WORDS = {
  network: ["errNetwork", "errNetworkWhy", "errNetworkDo"],
  broken: ["errBroken", "errBrokenWhy", "errBrokenDo"],
  key: ["errKey", "errKeyWhy", "errKeyDo"],
  busy: ["errBusy", "errBusyWhy", "errBusyDo"],
  long: ["errLong", null, "errLongDo"],
  model: ["errModel", null, "errModelDo"],
  refused: ["errRefused", null, "errRefusedDo"],
  server: ["errServer", null, "errServerDo"],
  format: ["errFormat", "errFormatWhy", "errFormatDo"],
};

/** Return the sentences of an error; where the cause is the server's to say, its own words. */
export function problemOf({ kind, says }) {
  const [what, why, remedy] = WORDS[kind] ?? WORDS.server;
  const cause = why ? t(why, { n: TRIES }) : says && t("serverSays", { text: says });
  return [t(what), cause, t(remedy)].filter(Boolean);
}
