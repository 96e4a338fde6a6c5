// Texts: words (or tokens) on a background that says how much they speak for the class explained, or against it.
//
// Letters: L layers, T tokens. A piece is [text, places of its tokens, whether the model read it].

function textBody(number) {
  const legend = make(
    "p",
    { class: "legend" },
    make("span", { class: "piece for", style: "--s:.8" }, "speaks for"),
    " the class explained (solid line), ",
    make("span", { class: "piece against", style: "--s:.8" }, "against"),
    " it (dotted line). The stronger the colour, the more it counts within this sample.",
  );
  const areas = make("div", { class: "texts" });
  const element = make("div", { class: "text-body" }, areas, legend);
  let shown = null;
  let made = null;
  let spans = [];

  areas.addEventListener("pointerover", (event) => tell(event.target.closest("[data-piece]")));
  areas.addEventListener("pointerleave", () => hideTooltip());
  areas.addEventListener("focusin", (event) => tell(event.target.closest("[data-piece]")));
  areas.addEventListener("focusout", () => hideTooltip());
  areas.addEventListener("click", (event) => event.target.closest("[data-piece]")?.focus());
  areas.addEventListener("keydown", walkWords);

  function draw(pane, evidence) {
    const sample = sampleOf(pane);
    if (made?.sample !== sample || made.unit !== state.unit) build(sample);
    const result = { ...tokenScores(evidence, settingsOf(pane)), pane };
    result.scores = spans.map(({ tokens }) => summed(result.values, tokens));
    const most = strongest(result.scores);
    spans.forEach(({ span }, index) => {
      const score = result.scores[index];
      span.className = `piece ${score >= 0 ? "for" : "against"}`;
      span.style.setProperty("--s", (Math.abs(score) / most).toFixed(3));
    });
    shown = result;
    return result;
  }

  function build(sample) {
    made = { sample, unit: state.unit };
    spans = [];
    hideTooltip();
    const blocks = state.unit === "tokens" ? tokenBlocks(sample) : sample.texts;
    areas.replaceChildren(
      ...blocks
        .flatMap((pieces, part) => {
          const title = blocks.length > 1 ? `${part ? "Second" : "First"} text` : null;
          // Which language a text is in nobody here knows; its direction of writing follows it.
          return [
            title ? make("h3", {}, title) : null,
            make(
              "div",
              {
                class: `text ${state.unit}`,
                dir: "auto",
                lang: "",
                role: "group",
                "aria-label": `${title ?? "Text"}: arrow keys go from word to word`,
              },
              pieces.map(pieceElement),
            ),
          ];
        })
        .filter(Boolean),
    );
    if (spans.length) spans[0].span.tabIndex = 0;
  }

  function pieceElement([text, tokens, seen]) {
    if (!seen) return make("span", { class: "unseen", title: "not seen by the model" }, text);
    if (!tokens.length) return document.createTextNode(text);
    const span = make("span", { class: "piece", tabindex: -1, data: { piece: spans.length } }, text);
    spans.push({ span, text, tokens });
    return span;
  }

  function walkWords(event) {
    const place = Number(event.target.closest("[data-piece]")?.dataset.piece ?? NaN);
    const wanted = {
      ArrowLeft: place - 1,
      ArrowUp: place - 1,
      ArrowRight: place + 1,
      ArrowDown: place + 1,
      Home: 0,
      End: spans.length - 1,
    }[event.key];
    if (wanted === undefined || Number.isNaN(place) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (!spans[wanted]) return;
    spans[place].span.tabIndex = -1;
    spans[wanted].span.tabIndex = 0;
    spans[wanted].span.focus();
  }

  function tell(span) {
    if (!span || !shown) {
      hideTooltip();
      return;
    }
    const { text, tokens } = spans[Number(span.dataset.piece)];
    const score = shown.scores[Number(span.dataset.piece)];
    showTooltip(span, tooltipContent(text, tokens, score, shown));
  }

  return { element, draw, scores: () => shown?.scores ?? [] };
}

/** Tokens as pieces, one list for each text; those that belong to neither stand with the text before them. */
function tokenBlocks(sample) {
  const owner = new Map();
  sample.texts.forEach((pieces, part) =>
    pieces.forEach(([, tokens]) => tokens.forEach((token) => owner.set(token, part))),
  );
  const blocks = sample.texts.map(() => []);
  let part = 0;
  sample.tokens.forEach((text, token) => {
    part = owner.get(token) ?? part;
    blocks[part].push([text, [token], true], [" ", [], true]);
  });
  return blocks;
}

function strongest(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
}
