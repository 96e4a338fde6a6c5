// The saliency arithmetic: what mhex_core.combine_maps and token scores are, here for one sample and one class.
//
// Letters: L layers, h x w layer size, H x W map size, T tokens.
// map = sum_l lambda_l resize(p_l + beta n_l), then a floor, then the min-max; score(t) = sum_l lambda_l (p_l + beta n_l).

const EPSILON = 2 ** -23; // of float32, in which Python adds up

/** The map of a class: values as Python gives them, and drawn, in [0, 1] or, where signed, in [-1, 1]. */
function saliency(evidence, method, settings, size) {
  const [height, width] = size;
  let values = aggregated(evidence, settings, height, width);
  if (method.floor) values = aboveFloor(values, method.floor);
  if (method.normalize) values = minMax(values, slack(evidence, settings));
  const [low, high] = extremes(values);
  return { values, drawn: drawable(values, method, low, high), height, width, low, high };
}

function aggregated(evidence, { beta, weights }, height, width) {
  // Resizing is linear, so layers of one size are added up before it.
  const sums = new Map();
  evidence.shapes.forEach((shape, layer) => {
    if (!weights[layer]) return;
    const key = shape.join("x");
    if (!sums.has(key)) sums.set(key, { shape, values: new Float64Array(shape[0] * shape[1]) });
    addLayer(sums.get(key).values, evidence, layer, weights[layer], beta);
  });
  const total = new Float64Array(height * width);
  for (const { shape, values } of sums.values()) addResized(total, height, width, values, shape[0], shape[1]);
  return total;
}

function addLayer(total, evidence, layer, weight, beta) {
  const plus = evidence.positive[layer];
  const minus = evidence.negative[layer];
  for (let index = 0; index < total.length; index += 1) total[index] += weight * (plus[index] + beta * minus[index]);
}

/** Add a layer to a map, bilinear, with the corners of the pixels (and not their centres) aligned. */
function addResized(total, height, width, values, rows, columns) {
  const across = places(width, columns);
  const down = places(height, rows);
  const wide = new Float64Array(rows * width);
  for (let row = 0; row < rows; row += 1) {
    const start = row * columns;
    for (let x = 0; x < width; x += 1) {
      const share = across.share[x];
      wide[row * width + x] = (1 - share) * values[start + across.first[x]] + share * values[start + across.second[x]];
    }
  }
  for (let y = 0; y < height; y += 1) {
    const share = down.share[y];
    const upper = down.first[y] * width;
    const lower = down.second[y] * width;
    for (let x = 0; x < width; x += 1) {
      total[y * width + x] += (1 - share) * wide[upper + x] + share * wide[lower + x];
    }
  }
}

/** Which two cells a pixel lies between, and how much of the second it takes. */
function places(pixels, cells) {
  const first = new Int32Array(pixels);
  const second = new Int32Array(pixels);
  const share = new Float64Array(pixels);
  for (let pixel = 0; pixel < pixels; pixel += 1) {
    const place = Math.max(0, ((pixel + 0.5) * cells) / pixels - 0.5);
    first[pixel] = Math.min(Math.floor(place), cells - 1);
    second[pixel] = Math.min(first[pixel] + 1, cells - 1);
    share[pixel] = place - first[pixel];
  }
  return { first, second, share };
}

/** max(0, map - q), q the value at place floor(quantile (N - 1)) of N in ascending order. */
function aboveFloor(values, quantile) {
  const floor = Float64Array.from(values).sort()[Math.trunc(quantile * (values.length - 1))];
  return values.map((value) => Math.max(0, value - floor));
}

/** The range that rounding alone can produce: Python's in float32, and that of the packed values. */
function slack(evidence, { beta, weights }) {
  let total = 0;
  evidence.shapes.forEach((_, layer) => {
    const [plus, minus] = evidence.largest[layer];
    const [plusStep, minusStep] = evidence.steps[layer];
    total += Math.abs(weights[layer]) * (16 * EPSILON * (plus + beta * minus) + plusStep + beta * minusStep);
  });
  return total;
}

/** A map brought to [0, 1] by its own extremes; a constant one becomes zeros. */
function minMax(values, rounding) {
  const [low, high] = extremes(values);
  if (high - low <= rounding) return new Float64Array(values.length);
  return values.map((value) => (value - low) / (high - low));
}

function extremes(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return values.length ? [low, high] : [0, 0];
}

/** Values that fill the scale: signed ones by their largest absolute value, others between their extremes. */
function drawable(values, method, low, high) {
  if (method.signed) {
    const scale = Math.max(Math.abs(low), Math.abs(high)) || 1;
    return values.map((value) => value / scale);
  }
  if (method.normalize) return values;
  const scale = high - low || 1;
  return values.map((value) => (value - low) / scale);
}

/** The settings that show one layer alone. */
function onlyLayer(settings, layer) {
  return { beta: settings.beta, weights: settings.weights.map((_, index) => Number(index === layer)) };
}

/** The share of pixels whose drawn value (of a signed map: its size) is at least a threshold. */
function shareAbove(drawn, threshold) {
  let count = 0;
  for (const value of drawn) if (Math.abs(value) >= threshold) count += 1;
  return count / (drawn.length || 1);
}

/** Where the strongest value of a map is, in words; "" where it is zero everywhere. */
function strongestRegion({ drawn, height, width }) {
  let place = 0;
  for (let index = 1; index < drawn.length; index += 1) {
    if (Math.abs(drawn[index]) > Math.abs(drawn[place])) place = index;
  }
  if (!drawn[place]) return "";
  const third = (position, side) => Math.min(2, Math.floor((3 * (position + 0.5)) / side));
  const row = third(Math.floor(place / width), height);
  const column = third(place % width, width);
  const words = [
    ["upper left", "top", "upper right"],
    ["left", "centre", "right"],
    ["lower left", "bottom", "lower right"],
  ];
  return words[row][column];
}

/** What each layer adds to each token: L arrays of T. */
function tokenShares(evidence, { beta, weights }) {
  return evidence.shapes.map((shape, layer) => {
    const share = new Float64Array(shape[0]);
    if (weights[layer]) addLayer(share, evidence, layer, weights[layer], beta);
    return share;
  });
}

/** The score of each token, and what it is made of. */
function tokenScores(evidence, settings) {
  const shares = tokenShares(evidence, settings);
  const values = new Float64Array(evidence.shapes[0][0]);
  for (const share of shares) for (let token = 0; token < values.length; token += 1) values[token] += share[token];
  return { values, shares };
}

/** The sum over the tokens of a piece. */
function summed(values, tokens) {
  return tokens.reduce((sum, token) => sum + values[token], 0);
}
