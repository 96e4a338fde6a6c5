// Words in numbers: the tip of a word, the strongest words, rows of layers, and beginnings of texts for the gallery.

const LISTED = 10; // strongest words

function tooltipContent(text, tokens, score, { shares, values, pane }) {
  const { layer_names: names, unit } = methodOf(pane);
  const { tokens: strings } = sampleOf(pane);
  const parts = shares.map((share) => summed(share, tokens));
  const short = shortNames(names);
  const most = strongest(parts);
  const rows = parts.map((part, layer) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, short[layer]),
      make("td", { class: "number" }, withSign(part)),
      make(
        "td",
        {},
        make("span", { class: `spark ${part >= 0 ? "for" : "against"}`, style: `--s:${Math.abs(part) / most}` }),
      ),
    ),
  );
  const pieces =
    tokens.length > 1 || strings[tokens[0]] !== text
      ? make(
          "p",
          { class: "tokens" },
          tokens.flatMap((token) => [given(strings[token]), ` ${withSign(values[token])}  `]),
        )
      : null;
  return [
    make(
      "p",
      {},
      make("strong", {}, given(text)),
      " ",
      make("span", { class: "number" }, withSign(score)),
      unit ? ` ${unit}` : "",
    ),
    names.length > 1 ? make("table", {}, rows) : null,
    pieces,
  ].filter(Boolean);
}

function showTooltip(anchor, content) {
  const tip = document.getElementById("tooltip");
  for (const other of document.querySelectorAll("[aria-describedby=tooltip]"))
    other.removeAttribute("aria-describedby");
  tip.replaceChildren(...content);
  tip.hidden = false;
  anchor.setAttribute("aria-describedby", "tooltip");
  const [box, own] = [anchor.getClientRects()[0] ?? anchor.getBoundingClientRect(), tip.getBoundingClientRect()];
  const below = box.bottom + 8 + own.height <= innerHeight;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - own.height - 8)}px`;
}

function hideTooltip() {
  const tip = document.getElementById("tooltip");
  if (tip) tip.hidden = true;
}

/** The words of the largest scores of either sign, strongest first. */
function strongestList(sample, { values }) {
  const words = sample.texts
    .flat()
    .filter(([, tokens, seen]) => seen && tokens.length)
    .map(([text, tokens]) => ({ text, score: summed(values, tokens) }))
    .filter(({ score }) => score !== 0)
    .sort((one, other) => Math.abs(other.score) - Math.abs(one.score))
    .slice(0, LISTED);
  const most = strongest(words.map(({ score }) => score));
  return [
    make("h3", {}, "Strongest words"),
    make(
      "ol",
      { class: "strongest" },
      words.map(({ text, score }) =>
        make(
          "li",
          {},
          given(text),
          make("span", {
            class: `spark ${score >= 0 ? "for" : "against"}`,
            style: `--s:${Math.abs(score) / most}`,
            "aria-hidden": "true",
          }),
          make("span", { class: "number" }, withSign(score)),
        ),
      ),
    ),
  ];
}

/** Draws what a layer alone gives each token: a row of colours, measured against the strongest of all layers. */
function textStrip(evidence, { beta }) {
  const shares = tokenShares(evidence, { beta, weights: evidence.shapes.map(() => 1) });
  const most = strongest(shares.flatMap((share) => [...share]));
  const style = getComputedStyle(document.documentElement);
  const [positive, negative] = ["--strong-for", "--strong-against"].map((name) =>
    style.getPropertyValue(name).trim().split(/\s+/).map(Number),
  );
  return (canvas, layer) => {
    const share = shares[layer];
    canvas.width = Math.max(1, share.length);
    canvas.height = 1;
    const image = new ImageData(canvas.width, 1);
    share.forEach((score, token) => {
      const colour = score >= 0 ? positive : negative;
      image.data.set([...colour, Math.round((255 * Math.abs(score)) / most)], 4 * token);
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
  };
}

/** The beginning of a text on its colours, for the gallery. */
async function paintSnippet(element, sample, characters) {
  const evidence = await unpackedEvidence(sample, 0);
  const { values } = tokenScores(evidence, defaults(sample.evidence[0].method));
  const pieces = [];
  let length = 0;
  for (const piece of sample.texts.flat()) {
    if (length > characters) break;
    pieces.push(piece);
    length += piece[0].length;
  }
  const scores = sample.texts.flat().map(([, tokens]) => summed(values, tokens));
  const most = strongest(scores);
  element.replaceChildren(
    ...pieces.map(([text, tokens], index) => {
      const score = scores[index];
      return tokens.length
        ? make(
            "span",
            { class: `piece ${score >= 0 ? "for" : "against"}`, style: `--s:${(Math.abs(score) / most).toFixed(3)}` },
            text,
          )
        : text;
    }),
  );
}
