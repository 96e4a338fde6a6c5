// Images: the picture, the map over it, the map alone, an outline, and a cross that reads values.
//
// Letters: H x W map size.

const CRISP = 64; // pixels: below, a picture is enlarged without smoothing
const STRIP = 96; // pixels of the longer side of a layer's map

function pictureBody(number) {
  const figures = [
    figure("Image", { picture: true }),
    figure("Overlay", { picture: true, heat: true, focus: true }),
    figure("Map", { heat: true }),
  ];
  const [, overlay, alone] = figures;
  const scale = make("canvas", { class: "scale", width: 256, height: 1, "aria-hidden": "true" });
  const low = make("span", { class: "number" });
  const high = make("span", { class: "number" });
  const remark = make("span", { class: "remark" });
  const share = make("span", { class: "share" });
  const reading = make("p", { class: "reading", id: `reading-${number}`, "aria-live": "polite" });
  overlay.stack.setAttribute("aria-describedby", `reading-${number}`);
  const element = make(
    "div",
    { class: "picture-body" },
    make(
      "div",
      { class: "figures" },
      figures.map((one) => one.element),
    ),
    make("div", { class: "legend" }, low, scale, high, remark),
    make("div", { class: "readings" }, reading, share),
  );
  let shown = null;
  let cross = null;
  let drawnPicture = null;

  for (const one of figures) {
    one.stack.addEventListener("pointermove", (event) => point(one.stack, event));
    one.stack.addEventListener("pointerdown", (event) => point(one.stack, event));
    one.stack.addEventListener("pointerleave", () => read(null));
  }
  overlay.stack.addEventListener("keydown", walkCross);
  overlay.stack.addEventListener("blur", () => read(null));

  function draw(pane, evidence, picture) {
    const method = methodOf(pane);
    const sample = sampleOf(pane);
    const result = saliency(evidence, method, settingsOf(pane), sample.evidence[pane.place].size);
    const other = !shown || shown.height !== result.height || shown.width !== result.width;
    shown = { ...result, method };
    if (drawnPicture !== picture) {
      for (const one of figures) one.drawPicture(picture);
      drawnPicture = picture;
    }
    // A picture of another shape than the map is stretched to it: that is what the model saw.
    element.style.setProperty("--ratio", result.width / result.height);
    for (const one of figures) one.fit(result);
    paint(overlay.heat, result, method, { opacity: 1 });
    overlay.heat.style.opacity = state.opacity;
    paint(alone.heat, result, method);
    outline(result, method);
    legend(result, method);
    overlay.stack.setAttribute("aria-label", summary(pane, result));
    read(other ? null : cross);
    return result;
  }

  function outline(result, method) {
    const { threshold } = state;
    const line = (level) =>
      threshold
        ? contour(
            level < 0 ? result.drawn.map((value) => -value) : result.drawn,
            result.height,
            result.width,
            Math.abs(level),
          )
        : "";
    for (const one of [overlay, alone]) one.outline(line(threshold), method.signed ? line(-threshold) : "");
    const of = method.signed ? "of the strongest, for or against" : "of the scale";
    share.textContent = threshold
      ? `${percent(shareAbove(result.drawn, threshold))} of the area at or above ${fixed(threshold)} ${of}`
      : "";
  }

  function legend(result, method) {
    paintScale(scale, method);
    const most = Math.max(Math.abs(result.low), Math.abs(result.high));
    const ends = method.signed ? [-most, most] : method.normalize ? [0, 1] : [result.low, result.high];
    [low.textContent, high.textContent] = ends.map(digits);
    const constant = result.high === result.low;
    const own = method.normalize ? "" : "scale of its own";
    remark.textContent = constant ? "the same everywhere" : own;
  }

  function point(stack, event) {
    if (!shown) return;
    const box = stack.getBoundingClientRect();
    const place = (share, side) => Math.min(side - 1, Math.max(0, Math.floor(share * side)));
    read({
      x: place((event.clientX - box.left) / box.width, shown.width),
      y: place((event.clientY - box.top) / box.height, shown.height),
    });
  }

  function walkCross(event) {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!direction || !shown || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const from = cross ?? { x: Math.floor(shown.width / 2), y: Math.floor(shown.height / 2) };
    const far = event.shiftKey ? 8 : 1;
    read({
      x: Math.min(shown.width - 1, Math.max(0, from.x + (cross ? far * direction[0] : 0))),
      y: Math.min(shown.height - 1, Math.max(0, from.y + (cross ? far * direction[1] : 0))),
    });
  }

  function read(place) {
    cross = place;
    for (const one of figures) one.cross(place);
    const text =
      place && shown
        ? `Column ${place.x}, row ${place.y}: ${digits(shown.values[place.y * shown.width + place.x])}`
        : "Point at a picture, or focus the overlay and use the arrow keys, to read values.";
    if (reading.textContent !== text) reading.textContent = text;
  }

  return { element, draw };
}

/** One of the three pictures: canvases on top of one another, lines above them. */
function figure(title, { picture = false, heat = false, focus = false }) {
  const pictureCanvas = picture ? make("canvas", { class: "picture" }) : null;
  const heatCanvas = heat ? make("canvas", { class: "heat" }) : null;
  const lines = makeSvg("svg", { class: "lines", "aria-hidden": "true", preserveAspectRatio: "none" });
  const paths = ["halo", "line", "halo", "line against", "cross-halo", "cross"].map((name) =>
    makeSvg("path", { class: name }),
  );
  lines.append(...paths);
  const stack = make(
    "div",
    focus ? { class: "stack", tabindex: 0, role: "img" } : { class: "stack", "aria-hidden": "true" },
    pictureCanvas,
    heatCanvas,
    lines,
  );
  return {
    element: make("figure", {}, stack, make("figcaption", {}, title)),
    stack,
    heat: heatCanvas,
    drawPicture(image) {
      if (!pictureCanvas) return;
      pictureCanvas.width = image.naturalWidth;
      pictureCanvas.height = image.naturalHeight;
      pictureCanvas.getContext("2d").drawImage(image, 0, 0);
      pictureCanvas.classList.toggle("crisp", Math.max(image.naturalWidth, image.naturalHeight) < CRISP);
    },
    fit({ width, height }) {
      lines.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.size = { width, height };
    },
    outline(positive, negative) {
      [positive, positive, negative, negative].forEach((data, index) => paths[index].setAttribute("d", data));
    },
    cross(place) {
      const data = place ? `M${place.x + 0.5} 0V${this.size.height}M0 ${place.y + 0.5}H${this.size.width}` : "";
      paths[4].setAttribute("d", data);
      paths[5].setAttribute("d", data);
    },
  };
}

/** What the map shows, in a sentence. */
function summary(pane, result) {
  const sample = sampleOf(pane);
  const where = strongestRegion(result);
  return [
    `Map of ${sample.name} by ${methodOf(pane).name} for ${className(targetOf(pane))}.`,
    `Predicted ${className(sample.prediction)}, ${percent(probability(sample, sample.prediction))}.`,
    where ? `Strongest in the ${where}.` : "The same everywhere.",
  ].join(" ");
}

/** A size of the same shape whose longer side is at most `most`. */
function smaller([height, width], most) {
  const factor = Math.min(1, most / Math.max(height, width));
  return [Math.max(1, Math.round(factor * height)), Math.max(1, Math.round(factor * width))];
}

/** Draws a layer's map on a canvas. */
function pictureStrip(evidence, method, settings, result) {
  const size = smaller([result.height, result.width], STRIP);
  return (canvas, layer) => paint(canvas, saliency(evidence, method, onlyLayer(settings, layer), size), method);
}

/** The picture with its map, small, for the gallery: by the sample's first method, as it comes. */
async function paintThumbnail(canvas, sample, most) {
  const [picture, evidence] = await Promise.all([pictureOf(sample), unpackedEvidence(sample, 0)]);
  const { method: index, size } = sample.evidence[0];
  const method = page.methods[index];
  const result = saliency(evidence, method, defaults(index), smaller(size, most));
  const heat = make("canvas");
  paint(heat, result, method, { opacity: state.opacity });
  const factor = most / Math.max(result.width, result.height);
  canvas.width = Math.round(factor * result.width);
  canvas.height = Math.round(factor * result.height);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = Math.max(picture.naturalWidth, picture.naturalHeight) >= CRISP;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = true;
  context.drawImage(heat, 0, 0, canvas.width, canvas.height);
}
