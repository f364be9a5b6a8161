/** The two languages: `t` gives a text, `translate` fills in index.html. */

import en from "./words_en.js";
import zh from "./words_zh.js";

const WORDS = { en, zh };
let language = "en";
let plural, numbers;

/** Choose "en", "zh" or "auto" (the browser's first language that there is). */
export function setLanguage(choice) {
  const wanted = choice === "auto" ? navigator.languages : [choice];
  const known = wanted.map((tag) => tag.slice(0, 2).toLowerCase()).find((tag) => tag in WORDS);
  language = known ?? "en";
  plural = new Intl.PluralRules(language);
  numbers = new Intl.NumberFormat(language, { maximumFractionDigits: 2 });
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  translate(document);
}

export const formatNumber = (value) => numbers.format(value);

/** Make one text of sentences. */
export const join = (sentences) => sentences.join(language === "zh" ? "" : " ");

/** Return the text of a key, with `{name}` replaced by `values`; numbers are written for people. */
export function t(key, values = {}) {
  const forms = WORDS[language][key].split("|");
  const text = forms.length > 1 && plural.select(values.n) !== "one" ? forms[1] : forms[0];
  return text.replace(/\{(\w+)\}/g, (_, name) => {
    const value = values[name];
    return typeof value === "number" ? formatNumber(value) : String(value ?? "");
  });
}

/** Fill in the texts, names and placeholders that the HTML asks for by data-t… attributes. */
function translate(root) {
  for (const node of root.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of root.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    if (node.matches("button, select")) node.title = t(node.dataset.tLabel);
  }
  for (const node of root.querySelectorAll("[data-t-placeholder]")) {
    node.placeholder = t(node.dataset.tPlaceholder);
  }
}
