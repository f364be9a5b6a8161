// What is there with weights: tokens, attention, the lens, the answer.

const labelOf = (token) => (token.piece === "<0x0A>" ? "⏎" : token.piece.replaceAll("▁", "␣"));
const quoted = (token) => T(`“${labelOf(token)}”`, `「${labelOf(token)}」`);

/** Sections after the shapes; without weights, how to get them. */
function realValues() {
  if (values === null) {
    return [el("section", { id: "values" }, el("h2", {}, T("Real values", "真实的数值")),
      el("p", { class: "muted" }, T(
        "This page was made from the configuration alone. With a checkpoint (--model DIR) it also shows attention, the next tokens after each layer, and the answer token by token.",
        "本页只由配置生成。有检查点时（--model DIR）还会显示注意力、每一层之后的下一个词元，以及逐个词元的回答。")))];
  }
  return [promptTokens(), attention(), lens(), lengths(), answer()];
}

function promptTokens() {
  return el("section", { id: "tokens" },
    el("h2", {}, T("The prompt as it is built", "实际送入的提示")),
    el("p", { class: "muted" }, T(
      `The question in its frame, and the ${whole(values.tokens.length)} ids made of it. ⏎ is a newline, ␣ a space, <0xF0> one byte of a character that has no piece of its own; dashed ids are special: no text becomes one.`,
      `放进固定格式的问题，以及由它得到的 ${whole(values.tokens.length)} 个 id。⏎ 是换行，␣ 是空格，<0xF0> 这样的是没有独立词元的字符的一个字节；虚线框是特殊 id，任何文本都不会变成它。`)),
    el("div", { class: "panel" }, el("pre", {}, values.text),
      el("div", { class: "chips" }, values.tokens.map((token) => el("span", { class: token.text ? "chip" : "chip special", title: token.piece }, labelOf(token), el("small", {}, String(token.id)))))));
}

function map(head) {
  const from = (t, s) => head.weights[t][s];
  const readout = el("div", { class: "readout", "aria-live": "polite" }, T("point at a cell", "把指针移到格子上"));
  const canvas = el("canvas", { class: "map", tabindex: "0", role: "img", "aria-label": T(`attention of layer ${head.layer}, head ${head.head}`, `第 ${head.layer} 层第 ${head.head} 头的注意力`) });
  const group = Math.floor(head.head / (walk.sizes.N / walk.sizes.K));
  canvas.head = head;
  canvas.at = null;
  const show = (t, s) => {
    if (t < 0 || s < 0 || t >= head.weights.length || s > t) return;
    canvas.at = [t, s];
    readout.textContent = T(`${percent(from(t, s))} of the attention of ${quoted(values.tokens[t])} goes to ${quoted(values.tokens[s])}`, `${quoted(values.tokens[t])} 的注意力有 ${percent(from(t, s))} 落在 ${quoted(values.tokens[s])} 上`);
    drawMap(canvas);
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const { left, top, cell } = canvas.layout;
    show(Math.floor((event.clientY - box.top - top) / cell), Math.floor((event.clientX - box.left - left) / cell));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [t, s] = canvas.at || [0, 0];
    show(t + step[0], Math.min(s + step[1], t + step[0]));
  });
  return el("figure", {}, el("figcaption", {}, el("b", {}, T(`layer ${head.layer}, head ${head.head}`, `第 ${head.layer} 层，第 ${head.head} 头`)), T(` (key/value head ${group})`, `（键值头 ${group}）`)), canvas, readout);
}

const maps = (heads) => el("div", { class: values.tokens.length > 48 ? "maps large" : "maps" }, heads.map(map));

/** Draws one map at the size its place has; the darker, the more (by the square root). */
function drawMap(canvas) {
  const { weights } = canvas.head;
  const count = weights.length;
  const style = getComputedStyle(document.documentElement);
  const width = canvas.clientWidth;
  const context = canvas.getContext("2d");
  const font = (size) => `${size}px system-ui, "PingFang SC", "Noto Sans CJK SC", "WenQuanYi Micro Hei", sans-serif`;
  context.font = font(11);
  const labels = values.tokens.map((token) => [...labelOf(token)].slice(0, 9).join(""));
  const room = Math.min(Math.max(...labels.map((label) => context.measureText(label).width)), 70) + 8;
  const cell = Math.max(1, Math.min(26, 720 / count, (width - room - 2) / count));
  const size = Math.min(12, cell - 1);
  const named = size >= 7;
  const left = named ? room : 0;
  const top = named ? room * 0.9 : 0;
  const height = Math.ceil(top + cell * count + 2);
  const sharp = window.devicePixelRatio || 1;
  canvas.layout = { left, top, cell };
  canvas.width = Math.round(width * sharp);
  canvas.height = Math.round(height * sharp);
  canvas.style.height = `${height}px`;
  context.scale(sharp, sharp);
  const heat = style.getPropertyValue("--heat").trim();
  context.fillStyle = style.getPropertyValue("--soft");
  context.beginPath();
  for (let t = 0; t < count; t += 1) context.rect(left, top + t * cell, (t + 1) * cell, cell);
  context.fill();
  for (let t = 0; t < count; t += 1) {
    for (let s = 0; s <= t; s += 1) {
      context.fillStyle = `rgb(${heat} / ${Math.sqrt(weights[t][s])})`;
      context.fillRect(left + s * cell, top + t * cell, cell - (cell > 6 ? 1 : 0), cell - (cell > 6 ? 1 : 0));
    }
  }
  if (named) {
    context.font = font(size);
    context.textBaseline = "middle";
    for (let t = 0; t < count; t += 1) {
      const strong = canvas.at && (canvas.at[0] === t || canvas.at[1] === t);
      context.fillStyle = style.getPropertyValue(strong ? "--ink" : "--muted");
      context.textAlign = "right";
      context.fillText(labels[t], left - 5, top + (t + 0.5) * cell, room - 8);
      context.save();
      context.translate(left + (t + 0.5) * cell, top - 5);
      context.rotate(-Math.PI / 3);
      context.textAlign = "left";
      context.fillText(labels[t], 0, 0, room - 8);
      context.restore();
    }
  }
  if (canvas.at) {
    context.strokeStyle = style.getPropertyValue("--ink");
    context.lineWidth = 1.5;
    context.strokeRect(left + canvas.at[1] * cell, top + canvas.at[0] * cell, cell - 1, cell - 1);
  }
}

function drawMaps() {
  for (const canvas of document.querySelectorAll("canvas.map")) drawMap(canvas);
}

function attention() {
  if (!values.heads.length) return null;
  return el("section", { id: "attention" },
    el("h2", {}, T("Where tokens look", "词元在看哪里")),
    el("p", { class: "muted" }, T(
      "A row is a token that looks, a column one that is looked at; a row sums to 100 %, and nothing after a token is seen. The stronger, the more (by the square root). Other heads: --heads LAYER:HEAD.",
      "一行是在看的词元，一列是被看的词元；每行之和为 100 %，后面的词元看不到。颜色越深越多（按平方根）。看别的头：--heads 层:头。")),
    el("div", { class: "panel" }, maps(values.heads)));
}

/** What one layer did, for its open block. */
function layerValues(index) {
  const layer = values.layers.find((one) => one.layer === index);
  const heads = values.heads.filter((head) => head.layer === index);
  const last = layer.stream.length - 1;
  return el("div", { "data-values": index },
    el("p", {}, T("At the last token the stream leaves with length ", "在最后一个词元处，离开本层的残差流长度为 "), el("b", {}, layer.stream[last].toPrecision(4)),
      T("; attention added ", "；注意力加了 "), el("b", {}, layer.attention[last].toPrecision(4)), T(", the feed-forward ", "，前馈加了 "), el("b", {}, layer.mlp[last].toPrecision(4)),
      T(". Read by norm and head here, the next token would be ", "。若在此处接上归一化和输出层，下一个词元是 "), guess(layer.lens[0], true), T(".", "。")),
    heads.length ? maps(heads) : null);
}

/** A candidate, tinted by its probability. */
function guess(candidate, best) {
  const box = el("span", { class: best ? "guess best" : "guess", title: `${candidate.token.piece} (${candidate.token.id})` }, el("span", { class: "piece" }, labelOf(candidate.token)), " ", el("small", {}, percent(candidate.probability)));
  box.style.background = `rgb(${getComputedStyle(document.documentElement).getPropertyValue("--heat").trim()} / ${0.06 + 0.44 * candidate.probability})`;
  return box;
}

function lens() {
  const final = values.layers[values.layers.length - 1].lens[0].token.id;
  const name = (layer) => (layer.layer < 0 ? T("embedding", "词嵌入") : T(`layer ${layer.layer}`, `第 ${layer.layer} 层`));
  return el("section", { id: "lens" },
    el("h2", {}, T("The next token, layer by layer", "逐层看下一个词元")),
    el("p", { class: "muted" }, T(
      "What norm and head would say after each layer (the “logit lens”), at the end of the prompt. The last row is the model's own; what it says first is framed wherever it shows up.",
      "在提示末尾，若每一层之后就接上归一化和输出层，会得到什么（“logit lens”）。最后一行是模型自己的结果；它的首选在各层出现时加框。")),
    el("div", { class: "panel" }, el("table", { class: "lens" }, values.layers.map((layer) =>
      el("tr", { "data-lens": layer.layer }, el("td", { class: "muted" }, name(layer)), layer.lens.map((one) => el("td", {}, guess(one, one.token.id === final))))))));
}

function lengths() {
  const chosen = state.token ?? values.tokens.length - 1;
  const [W, H, left, bottom] = [Math.max(300, Math.min(innerWidth, 1240) - 90), 220, 48, 26];
  const count = values.layers.length;
  const series = [["--io", T("stream", "残差流"), "stream"], ["--attention", T("added by attention", "注意力加的"), "attention"], ["--mlp", T("added by the feed-forward", "前馈加的"), "mlp"]];
  const most = Math.max(...series.flatMap(([, , key]) => values.layers.map((layer) => layer[key][chosen])), 1e-9);
  const x = (index) => left + ((W - left - 12) * index) / Math.max(count - 1, 1);
  const y = (value) => H - bottom - ((H - bottom - 14) * value) / most;
  const lines = series.map(([color, name, key]) => {
    const points = values.layers.map((layer, index) => `${x(index).toFixed(1)} ${y(layer[key][chosen]).toFixed(1)}`);
    const path = el("path", { d: `M${points.join("L")}`, fill: "none", "stroke-width": 2 });
    path.style.stroke = `var(${color})`;
    const dots = values.layers.map((layer, index) => {
      const dot = el("circle", { cx: x(index), cy: y(layer[key][chosen]), r: count > 40 ? 2 : 3 }, el("title", {}, `${name}: ${layer[key][chosen].toPrecision(4)}`));
      dot.style.fill = `var(${color})`;
      return dot;
    });
    return el("g", {}, path, dots);
  });
  const every = Math.ceil((count * 42) / W);
  const marks = values.layers.filter((layer, index) => index % every === 0).map((layer) =>
    el("text", { x: x(layer.layer + 1), y: H - 8, "text-anchor": "middle" }, layer.layer < 0 ? T("embed", "嵌入") : String(layer.layer)));
  const grid = [0, 0.5, 1].map((share) => {
    const rule = el("line", { x1: left, x2: W - 12, y1: y(most * share), y2: y(most * share) });
    rule.style.stroke = "var(--line)";
    return el("g", {}, rule, el("text", { x: left - 6, y: y(most * share) + 4, "text-anchor": "end" }, (most * share).toPrecision(3)));
  });
  return el("section", { id: "lengths" },
    el("h2", {}, T("How long the stream grows", "残差流变得多长")),
    el("p", { class: "muted" }, T("Euclidean lengths after each layer, of the token chosen below.", "每一层之后的欧几里得长度；在下面选择词元。")),
    el("div", { class: "panel" },
      el("div", { class: "chips" }, values.tokens.map((token, index) => el("button", {
        type: "button", class: "chip", "aria-pressed": String(index === chosen), click: () => { state.token = index; document.getElementById("lengths").replaceWith(lengths()); },
      }, labelOf(token)))),
      el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": T("lengths by layer", "逐层的长度") }, grid, marks, lines),
      el("div", { class: "legend" }, series.map(([color, name]) => el("span", {}, painted(color), name)))));
}

function answer() {
  const ends = { stop: T("The last one is the end.", "最后一个是结束。"), length: T("It was cut at the longest answer that was asked for.", "到要求的最大长度为止。") }[values.end] || values.end;
  return el("section", { id: "answer" },
    el("h2", {}, T("The answer, token by token", "逐个词元的回答")),
    el("p", { class: "muted" }, T(
      `Always the likeliest one is taken here; a chat draws. Probabilities are before temperature, top-k and top-p. ${ends}`,
      `这里总取最可能的一个；对话时是抽样。概率是 temperature、top-k、top-p 之前的。${ends}`)),
    el("div", { class: "panel" }, el("table", { class: "lens" },
      el("tr", {}, ["", T("token", "词元"), T("probability", "概率"), T("instead", "其他可能")].map((text) => el("th", {}, text))),
      values.steps.map((step, index) => {
        const { token, probability } = step.chosen;
        return el("tr", { "data-step": index }, el("td", { class: "muted num" }, String(index + 1)),
          el("td", {}, el("b", {}, labelOf(token)), " ", el("small", {}, String(token.id))),
          el("td", {}, el("div", { class: "share" }, el("div", { class: "stack" }, painted("--io", probability)), el("small", {}, percent(probability)))),
          el("td", { class: "instead" }, step.alternatives.filter((one) => one.token.id !== token.id).map((one) => [guess(one, false), " "])));
      }))));
}

/** What depends on the size of the window. */
function fit() {
  drawMaps();
  document.getElementById("lengths")?.replaceWith(lengths());
}

start();
