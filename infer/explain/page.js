"use strict";
// The page around the data: what needs only a configuration. All text is set as text.

const { walk, values } = JSON.parse(document.getElementById("data").textContent);
const state = {
  lang: new URLSearchParams(location.search).get("lang") || navigator.language,
  pass: "prefill", // or "decode"
  layer: null, // the open block
  token: null, // of the prompt, whose lengths are drawn
};
state.lang = state.lang.toLowerCase().startsWith("zh") ? "zh" : "en";

/** One of two texts, by language. */
const T = (en, zh) => (state.lang === "zh" ? zh : en);
const passOf = (name) => (name === "decode" ? walk.decode : walk.prefill);
const whole = (n) => n.toLocaleString("en-US");
const rounded = (n) => whole(Number(n.toPrecision(3)));
function percent(p) {
  if (p > 0 && p < 0.0005) return "< 0.05\u00a0%";
  if (p > 0.9995 && p < 1) return "> 99.9\u00a0%";
  return `${(100 * p).toFixed(p < 0.1 ? 2 : 1)}\u00a0%`;
}

/** 203346608128, "FLOP" -> "203 GFLOP"; 6243584000, "" -> "6.24B" (billions): three digits. */
function short(n, unit) {
  const steps = ["", unit ? "k" : "K", "M", unit ? "G" : "B", "T", "P"];
  let power = 0;
  while (n >= 999.5 && power < steps.length - 1) {
    n /= 1000;
    power += 1;
  }
  const digits = n >= 100 || (power === 0 && Number.isInteger(n)) ? 0 : n >= 10 ? 1 : 2;
  return `${n.toFixed(digits)}${unit ? "\u00a0" : ""}${steps[power]}${unit}`;
}

function seconds(s) {
  if (s >= 1) return `${s.toPrecision(3)} s`;
  return s >= 1e-3 ? `${(s * 1e3).toPrecision(3)} ms` : `${(s * 1e6).toPrecision(3)} µs`;
}

/** An element; children are elements or texts, attributes that are functions are listeners. */
function el(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "g", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

const shape = (numbers) => `[${numbers.join(", ")}]`;
/** The demo model is named in the page's language. */
const modelName = () => (walk.model === "the bundled demo model" ? T("the bundled demo model", "内置演示模型") : walk.model);

/** A stage's shape; gate and up also side by side. */
function shapes(stage) {
  const at = stage.axes.indexOf("C");
  if (at < 0 || stage.shape[at] === 1) return shape(stage.shape);
  const joined = [...stage.shape.slice(0, at), stage.shape[at] * stage.shape[at + 1]];
  return `${shape(stage.shape)} = ${shape(joined)}`;
}

/** 28672 -> "28 KiB", as the terminal has it. */
function binary(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  while (bytes >= 1024 && units.length > 1) {
    bytes /= 1024;
    units.shift();
  }
  return `${Number(bytes.toPrecision(4))} ${units[0]}`;
}

/** "BTCF" -> "B T 2 F". */
const axes = (letters) => [...letters].map((letter) => (letter === "C" ? walk.sizes.C : letter)).join(" ");

/** Parameters, operations and bytes, those that are not 0. */
function cost(stage) {
  const parts = [];
  if (stage.params) parts.push(`${short(stage.params, "")}\u00a0${T("params", "参数")}`);
  if (stage.flops) parts.push(short(stage.flops, "FLOP"));
  if (stage.bytes) parts.push(short(stage.bytes, "B"));
  return parts.join("\u00a0· ");
}

const title = (stage) => T(stage.title_en, stage.title_zh);
const note = (stage) => T(stage.note_en, stage.note_zh);
const find = (name) => passOf(state.pass).stages.find((stage) => stage.name === name);

function topBar() {
  const choice = (name, options) =>
    el("span", { class: "switch", role: "group" }, options.map(([value, text, label]) =>
      el("button", {
        type: "button", "data-set": `${name}-${value}`, "aria-pressed": String(state[name] === value), "aria-label": label || null,
        click: () => { state[name] = value; render(); },
      }, text)));
  const passes = [
    ["prefill", T(`prefill: ${whole(walk.prefill.tokens)} ids`, `预填充：${whole(walk.prefill.tokens)} 个 id`)],
    ["decode", T("decode step: 1 id", "解码步：1 个 id")],
  ];
  return el("div", { class: "bar" }, el("div", {},
    el("b", {}, modelName()),
    choice("pass", passes),
    choice("lang", [["en", "EN", "English"], ["zh", "中文"]])));
}

function intro() {
  const counted = {
    published: T(", counted with the published tokenizer", "（按官方分词器计）"), asked: T(", as given", "（由命令行参数指定）"), example: T(", an example", "（示例）"), tokenizer: "",
  }[walk.length_from];
  const pass = passOf(state.pass);
  const s = walk.sizes;
  const card = (label, number, more) => el("div", { class: "card" },
    el("span", { class: "muted" }, label), el("strong", {}, number), el("span", { class: "muted" }, more));
  const perPass = state.pass === "prefill" ? T("prefill", "预填充") : T("one decode step", "一个解码步");
  return el("section", {},
    el("h1", {}, T("From prompt to answer", "模型剖析：从提示词到回答")),
    el("p", { class: "muted" }, T(
      `${modelName()}: ${s.L} layers of ${s.D}, ${s.N} query heads on ${s.K} key/value heads of ${s.H}, feed-forward ${s.F}, vocabulary ${whole(s.V)}. All figures come from the code that generates answers.`,
      `${modelName()}：${s.L} 层，隐藏维度 ${s.D}；${s.N} 个查询头，${s.K} 个键值头，每头 ${s.H} 维；前馈维度 ${s.F}；词表 ${whole(s.V)}。所有数字都来自实际生成回答的代码。`)),
    values && el("div", { class: "talk" },
      el("div", { class: "question" }, walk.prompt), el("div", { class: "answer", id: "answer-text" }, values.answer)),
    el("div", { class: "cards" },
      card(T("parameters", "参数"), short(walk.params, ""), whole(walk.params)),
      card(T("weights", "权重"), short(walk.weight_bytes, "B"),
        walk.weights_in + (values && values.dtype !== walk.weights_in ? T(`; values below: ${values.dtype}`, `；下方数值按 ${values.dtype} 计算`) : "")),
      card(T("prompt", "提示词"), T(`${whole(walk.length)} id${walk.length === 1 ? "" : "s"}`, `${whole(walk.length)} 个 id`),
        (s.B > 1 ? T(`${s.B} rows`, `批大小 ${s.B}`) : T("one row", "批大小 1")) + counted),
      card(T("operations", "计算量"), short(pass.flops, "FLOP"), perPass),
      card(T("memory traffic", "访存量"), short(pass.bytes, "B"), perPass),
      card(T("arithmetic intensity", "计算强度"), rounded(pass.intensity), T("FLOP per byte", "FLOP / 字节"))));
}

function pipeline() {
  const { B, L } = walk.sizes;
  const pass = passOf(state.pass);
  const node = (kind, name, ...inside) => el("div", { class: `node ${kind}`, "data-stage": name }, inside);
  const stageNode = (kind, name) => {
    const stage = find(name);
    return node(kind, name, el("h3", {}, title(stage)), el("span", { class: "shape" }, shape(stage.shape)), el("span", { class: "cost" }, cost(stage)),
      name === "embed" ? el("p", { class: "note" }, note(stage)) : null);
  };
  const layerParts = pass.stages.filter((stage) => stage.part === "attention" || stage.part === "mlp");
  const all = { params: 0, flops: 0, bytes: 0 };
  for (const stage of layerParts) for (const key in all) all[key] += L * stage[key];
  const strip = el("div", { class: "strip" }, Array.from({ length: L }, (_, layer) =>
    el("button", {
      type: "button", "data-layer": layer, "aria-expanded": String(state.layer === layer),
      "aria-label": T(`layer ${layer}`, `第 ${layer} 层`),
      click: () => { location.hash = state.layer === layer ? "pipeline" : `layer-${layer}`; },
    }, String(layer))));
  const first = state.pass === "prefill";
  const given = walk.prompt === null ? "" : T("template and special ids included", "含模板和特殊 token");
  return el("section", { id: "pipeline" },
    el("h2", {}, T("Pipeline", "计算流程")),
    el("p", { class: "muted" }, T(
      "The switch at the top selects the shapes: the complete prompt at once, or one id of the answer. Click a layer to open it.",
      "用顶部的开关切换：一次处理整个提示词（预填充），或只处理回答中的一个 id（解码步）。点击任意一层可展开其内部结构。")),
    letters(pass),
    el("div", { class: "pipeline" },
      node("io", "prompt", el("h3", {}, T("prompt", "提示词")),
        el("span", { class: "said" }, walk.prompt === null ? T("(only its length is given)", "（只指定了长度）") : walk.prompt)),
      node("io", "ids", el("h3", {}, T("ids", "token id")), el("span", { class: "shape" }, shape([B, pass.tokens])),
        el("span", { class: "cost" }, first ? given : T("the last one sampled", "上一步采样得到的 id"))),
      stageNode("io", "embed"),
      node("blocks", "blocks", el("h3", {}, T(`${L} layers`, `${L} 层（结构相同）`)), strip,
        el("span", { class: "shape" }, shape(find("mlp.add").shape)), el("span", { class: "cost" }, cost(all))),
      stageNode("io", "norm"),
      stageNode("head", "head"),
      node("io", "sampling", el("h3", {}, T("sample one id", "采样得到下一个 id")), el("span", { class: "shape" }, shape([B])),
        el("span", { class: "cost" }, values ? T("here: the most probable", "此处取概率最高的 id") : T("from the last position's logits", "根据最后一个位置的 logits"))),
      el("div", { class: "loop" }, T("the new id is the next input; keys and values stay in the cache; repeat until the end id", "新的 id 作为下一步的输入，之前的键和值保留在缓存中；如此重复，直到生成结束符"))));
}

/** What the letters of shapes stand for. */
function letters(pass) {
  const s = walk.sizes;
  const meanings = [
    ["B", s.B, T("rows (batch size)", "批大小")], ["T", pass.tokens, T("input tokens per row", "每条序列输入的 token 数")],
    ["S", pass.keys, T("tokens in the cache", "缓存中的 token 数")], ["D", s.D, T("hidden size", "隐藏维度")],
    ["N", s.N, T("query heads", "查询头数")], ["K", s.K, T("key/value heads", "键值头数")], ["H", s.H, T("head size", "每头维度")],
    ["F", s.F, T("feed-forward size", "前馈维度")], ["V", s.V, T("vocabulary size", "词表大小")],
  ];
  return el("p", { class: "letters muted" }, meanings.map(([letter, size, meaning]) =>
    el("span", {}, el("b", { class: "mono" }, letter), ` = ${whole(size)} ${meaning}`)));
}

// Each line of a block's drawing, in lanes: a stage in as many as it takes, "|" passes by. Then, how
// many arrows leave it, where it is not one.
// The lanes of attention are those of queries, keys and values.
const ROWS = {
  attention: [["norm", 3, 3], ["q", 1], ["k", 1], ["v", 1], ["rope_q", 1], ["rope_k", 1], ["| rope", 1], ["|", 1], ["cache", 2, 2],
    ["scores", 2], ["|", 1], ["softmax", 2], ["|", 1], ["values", 3], ["o", 3], ["post_norm", 3], ["add", 3]],
  mlp: [["norm", 3], ["gate_up", 3], ["act", 3], ["down", 3], ["post_norm", 3], ["add", 3]],
};
/** The lines of a part that this model has; positions of another kind need no rotation. */
const rowsOf = (part) => ROWS[part].filter(([stage]) =>
  (stage.startsWith("|") ? stage === "|" || find("attention.rope_q") : find(`${part}.${stage}`)));
/** What goes into a stage that does not read the one above it alone. */
const inputs = (name) => ({
  "attention.k": T(`input: ${title(find("attention.norm"))}`, `输入：${title(find("attention.norm"))}`),
  "attention.v": T(`input: ${title(find("attention.norm"))}`, `输入：${title(find("attention.norm"))}`),
  "attention.rope_q": T("input: queries", "输入：查询 Q"), "attention.rope_k": T("input: keys", "输入：键 K"),
  "attention.cache": find("attention.rope_k") ? T("input: rotated keys, values", "输入：旋转后的 K、值 V") : T("input: keys, values", "输入：键 K、值 V"),
  "attention.scores": find("attention.rope_q") ? T("input: rotated queries, cached keys", "输入：旋转后的 Q、缓存中的 K") : T("input: queries, cached keys", "输入：查询 Q、缓存中的 K"),
  "attention.values": T("input: softmax, cached values", "输入：softmax、缓存中的 V"),
})[name];

function part(name, heading) {
  const stages = passOf(state.pass).stages.filter((stage) => stage.part === name);
  const total = { params: 0, flops: 0, bytes: 0 };
  for (const stage of stages) for (const key in total) total[key] += stage[key];
  const box = (stage) => el("div", { class: `stage${stage.params || stage.flops || stage.bytes ? "" : " plain"}`, "data-stage": stage.name },
    el("div", { class: "title" }, title(stage)),
    inputs(stage.name) ? el("div", { class: "from muted" }, inputs(stage.name)) : null,
    el("span", { class: "shape" }, shapes(stage), " ", el("span", { class: "axes" }, axes(stage.axes))),
    el("div", { class: "cost" }, cost(stage)),
    note(stage) ? el("p", { class: "note" }, note(stage)) : null);
  return el("div", { class: `part ${name}` },
    el("h3", {}, heading), el("div", { class: "total" }, T("total: ", "合计：") + cost(total)),
    el("div", { class: "skip", title: T("residual stream", "残差流") }),
    el("div", { class: "lanes" }, rowsOf(name).map(([stage, lanes, arrows]) =>
      el("div", { class: `lane${lanes}${stage.startsWith("|") ? " pass" : ""}` }, stage.startsWith("|") ? null : box(find(`${name}.${stage}`)),
        stage === "add" ? null : el("div", { class: "arrows", "aria-hidden": "true" }, Array.from({ length: arrows || 1 }, () => el("span", {}, "↓")))))));
}

function block() {
  const { L } = walk.sizes;
  const open = state.layer;
  const go = (layer) => () => { location.hash = layer === null ? "pipeline" : `layer-${layer}`; };
  return el("section", { id: `layer-${open}`, class: "panel", "data-block": open },
    el("div", { class: "tools" },
      el("h2", {}, T(`Layer ${open}`, `第 ${open} 层`), el("span", { class: "muted" }, T(` (0 – ${L - 1})`, `（0 – ${L - 1}）`))),
      el("button", { type: "button", disabled: open === 0 ? "" : null, click: go(open - 1) }, T("← previous", "← 上一层")),
      el("button", { type: "button", disabled: open === L - 1 ? "" : null, click: go(open + 1) }, T("next →", "下一层 →")),
      el("button", { type: "button", "data-close": "", click: go(null) }, T("close", "关闭"))),
    el("p", { class: "muted" }, T(
      "All layers have these shapes; only their weights differ. The line on the left is the residual stream, to which the last step of each half adds.",
      "所有层的形状都相同，只有权重不同。左侧的竖线是残差流，注意力和前馈网络的最后一步都加到它上面。")),
    el("div", { class: "block" },
      part("attention", T("Attention", "注意力")),
      el("div", {}, part("mlp", T("Feed-forward (MLP)", "前馈网络（MLP）")), values ? layerValues(open) : null)));
}

const GROUPS = [
  ["--io", "embedding", "词嵌入", (name) => name === "embed"],
  ["--attention", "attention: q, k, v, output", "注意力：q、k、v、输出投影", (name) => /^attention\.([qkvo]|norm|post_norm)$/.test(name)],
  ["--scores", "attention: scores, values, cache", "注意力：分数、加权和、缓存", (name) => /^attention\.(scores|values|cache)$/.test(name)],
  ["--mlp", "feed-forward", "前馈网络", (name) => name.startsWith("mlp.")],
  ["--head", "norm and head", "归一化与输出层", (name) => name === "head" || name === "norm"],
];

function painted(color, share) {
  const piece = el("i", {});
  piece.style.background = `var(${color})`;
  if (share !== undefined) piece.style.width = `${100 * share}%`;
  return piece;
}

const barLine = (label, stack, size) =>
  el("div", { class: "line" }, el("span", {}, label), stack, el("span", { class: "num mono" }, size));

function costs() {
  const pass = passOf(state.pass);
  const sums = (key) => GROUPS.map(([, , , has]) => pass.stages.filter((stage) => has(stage.name))
    .reduce((sum, stage) => sum + stage[key] * (/^(attention|mlp)$/.test(stage.part) ? walk.sizes.L : 1), 0));
  const line = (label, key, unit) => {
    const parts = sums(key);
    const total = parts.reduce((a, b) => a + b, 0);
    const stack = el("div", { class: "stack" }, parts.map((n, index) => {
      const piece = painted(GROUPS[index][0], n / total);
      piece.title = `${T(GROUPS[index][1], GROUPS[index][2])}: ${short(n, unit)} (${percent(n / total)})`;
      return n ? piece : null;
    }));
    return barLine(label, stack, short(total, unit));
  };
  return el("section", { id: "costs" },
    el("h2", {}, T("Parameters, compute and memory traffic", "参数、计算量与访存分布")),
    el("p", { class: "muted" }, T(
      "FLOP: 2 for each multiply-add of a matrix product, masked scores included. Bytes: weights read, keys and values written and read. In prefill the head is counted for every position; generation needs only the last one.",
      "计算量：矩阵乘法中一次乘加计为 2 FLOP，被掩码屏蔽的分数也计入。访存量：读取的权重，以及读写的键和值。预填充时输出层按全部位置计；生成回答只需要最后一个位置。")),
    el("div", { class: "panel" }, el("div", { class: "bars" },
      line(T("parameters", "参数"), "params", ""), line(T("FLOP", "计算量"), "flops", "FLOP"), line(T("bytes", "访存量"), "bytes", "B")),
    el("div", { class: "legend" }, GROUPS.map(([color, en, zh]) => el("span", {}, painted(color), T(en, zh))))));
}

function cache() {
  const { cache } = walk;
  const bar = (bytes, color) => el("div", { class: "stack" }, painted(color, bytes / cache.with_full_heads));
  return el("section", { id: "cache" },
    el("h2", {}, T("KV cache size", "KV 缓存大小")),
    el("div", { class: "panel" },
      el("div", { class: "bars" },
        barLine(T(`per token, ${walk.sizes.K} key/value heads`, `每个 token，${walk.sizes.K} 个键值头`), bar(cache.per_token, "--attention"), binary(cache.per_token)),
        walk.sizes.G === 1 ? [] : barLine(T(`with ${walk.sizes.N} instead`, `若为 ${walk.sizes.N} 个键值头`), bar(cache.with_full_heads, "--scores"), binary(cache.with_full_heads))),
      el("p", { class: "muted" }, walk.sizes.G === 1 ? T(
        `${binary(cache.now)} after this prompt, ${binary(cache.at_most)} at ${whole(walk.context)} tokens.`,
        `处理完这个提示词后为 ${binary(cache.now)}，${whole(walk.context)} 个 token 时为 ${binary(cache.at_most)}。`) : T(
        `${binary(cache.now)} after this prompt, ${binary(cache.at_most)} at ${whole(walk.context)} tokens: 1/${cache.with_full_heads / cache.per_token} of what one key/value head per query head would take.`,
        `处理完这个提示词后为 ${binary(cache.now)}，${whole(walk.context)} 个 token 时为 ${binary(cache.at_most)}，仅为每个查询头各配一个键值头时的 1/${cache.with_full_heads / cache.per_token}。`))));
}

/** Which tokens see which, where the prompt looks ahead: drawn for a prompt that is cut short. */
function mask() {
  if (!walk.looks_ahead) return null;
  const context = Math.min(walk.length - 1, 9);
  const count = context + 4;
  const cell = 22;
  const left = 92;
  const name = (row) => (row < context ? T("prompt", "提示词") : row === context ? "<sop>" : T("answer", "回答"));
  const color = (row, col) => (col > Math.max(row, context - 1) ? "--soft" : row < context ? "--io" : "--attention");
  const rows = Array.from({ length: count }, (_, row) => el("g", {},
    el("text", { x: left - 8, y: row * cell + 15, "text-anchor": "end" }, name(row)),
    Array.from({ length: count }, (_, col) => {
      const box = el("path", { d: `M${left + col * cell} ${row * cell}h${cell - 2}v${cell - 2}h${2 - cell}z` });
      box.style.fill = `var(${color(row, col)})`;
      return box;
    })));
  const drawing = el("svg", { viewBox: `0 0 ${left + count * cell} ${count * cell}`, role: "img", "aria-label": T("attention mask", "注意力掩码") }, rows);
  drawing.style.maxWidth = `${left + count * cell}px`;
  return el("section", { id: "mask" },
    el("h2", {}, T("What each token sees", "每个 token 能看到什么")),
    el("p", { class: "muted" }, T(
      "A row is a token, a column a token that it may see. The tokens before <sop> see each other, also later ones: the prompt is prefilled in one piece, and nothing of it can be reused for a longer prompt. From <sop> on, a token sees itself and what came before.",
      "每行是一个 token，每列是它可以看到的 token。<sop> 之前的 token 彼此可见（包括后面的）：提示词必须一次性预填充，提示词变长后，之前的计算不能复用。从 <sop> 起，每个 token 只能看到自己和之前的内容。")),
    el("div", { class: "panel" }, drawing));
}

function devices() {
  if (!walk.bounds.length) return null;
  const limit = (name) => ({ bandwidth: T("bandwidth", "带宽"), arithmetic: T("compute", "算力"), unknown: "?" })[name];
  const unknown = walk.bounds.some((bound) => bound.flops === null);
  return el("section", { id: "devices" },
    el("h2", {}, T("Theoretical bounds by device", "各设备的理论瓶颈")),
    el("p", { class: "muted" }, T(
      "Minimum times from the makers' figures, which no program reaches; nothing here was measured. The head is computed at one position of each prompt, and masked scores are left out.",
      "由厂商标称值算出的时间下限，任何程序都达不到，并非实测。输出层只按每个提示词的一个位置计，被掩码屏蔽的分数不计。"),
    unknown ? T(" ?: no compute figure is published; the times are those of the bytes alone.", " ?：厂商未公布算力，时间只按访存量计。") : null),
    el("div", { class: "panel" }, el("table", {},
      el("tr", {}, [T("device", "设备"), T("memory", "显存"), T("bandwidth", "带宽"), T("fits", "能否放下"), T("prefill", "预填充"), T("decode step", "解码步"), T("bound by (prefill / step)", "瓶颈（预填充 / 解码步）"), "tokens/s"]
        .map((text, index) => el("th", { class: [1, 2, 4, 5, 7].includes(index) ? "num" : null }, text))),
      walk.bounds.map((bound) => el("tr", {},
        el("td", {}, bound.device), el("td", { class: "num" }, short(bound.memory, "B")), el("td", { class: "num" }, `${short(bound.bandwidth, "B")}/s`),
        el("td", {}, bound.fits ? "✓" : T("no", "否")), el("td", { class: "num" }, seconds(bound.prefill)), el("td", { class: "num" }, seconds(bound.decode)),
        el("td", {}, [...new Set([bound.prefill_limit, bound.decode_limit])].map(limit).join(" / ")), el("td", { class: "num" }, rounded(bound.tokens_per_s)))))));
}

function everything() {
  const pass = passOf(state.pass);
  return el("details", { id: "stages" }, el("summary", {}, T(`All ${pass.stages.length} stages in figures`, `全部 ${pass.stages.length} 个阶段的数据`)),
    el("div", { class: "panel" }, el("table", {},
      el("tr", {}, [T("stage", "阶段"), "", T("shape", "形状"), T("published code", "官方代码"), T("parameters", "参数"), "FLOP", T("bytes", "字节")]
        .map((text, index) => el("th", { class: index > 3 ? "num" : null }, text))),
      pass.stages.map((stage) => el("tr", { "data-row": stage.name },
        el("td", {}, title(stage), /^(attention|mlp)$/.test(stage.part) ? el("small", { class: "muted" }, ` x ${walk.sizes.L}`) : null),
        el("td", { class: "mono" }, axes(stage.axes)), el("td", { class: "mono" }, shapes(stage)), el("td", { class: "mono muted" }, shape(stage.reference)),
        [stage.params, stage.flops, stage.bytes].map((n) => el("td", { class: "num mono" }, n ? whole(n) : "")))))));
}

/** What the fragment asks for: an open block, or a place to scroll to. */
function readHash() {
  const asked = /^#layer-(\d+)$/.exec(location.hash);
  state.layer = asked && Number(asked[1]) < walk.sizes.L ? Number(asked[1]) : null;
}

function render() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  document.title = `${walk.prompt || modelName()} · infer.explain`;
  const page = document.getElementById("page");
  page.replaceChildren(topBar(), el("main", {},
    intro(), pipeline(), state.layer === null ? null : block(), costs(), everything(), mask(), cache(), devices(), ...realValues()));
  clearBar();
  drawResiduals();
  drawMaps();
}

/** Let what is scrolled to stop below the bar, which has two rows on a narrow screen. */
function clearBar() {
  document.documentElement.style.scrollPaddingTop = `${document.querySelector(".bar").offsetHeight + 16}px`;
}

function start() {
  readHash();
  render();
  addEventListener("hashchange", () => {
    readHash();
    render();
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  });
  addEventListener("resize", () => { clearBar(); fit(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMaps);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  document.documentElement.dataset.ready = "yes";
}

addEventListener("error", (event) => {
  document.documentElement.dataset.failed = event.message;
  document.body.prepend(el("div", { class: "failed" }, event.message));
});
