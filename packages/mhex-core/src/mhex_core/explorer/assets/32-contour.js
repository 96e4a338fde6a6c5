// Lines of equal value through a map, by marching squares.
//
// Letters: H x W map size. Values stand at the centres of pixels. An edge between two neighbouring centres has a number:
// 2 (y W + x) to the right of pixel (y, x), 2 (y W + x) + 1 below it.

// For each of 16 cases (bits: upper left, upper right, lower right, lower left is inside) the sides that are joined.
const [TOP, RIGHT, BOTTOM, LEFT] = [0, 1, 2, 3];
const JOINED = [
  [],
  [[LEFT, TOP]],
  [[TOP, RIGHT]],
  [[LEFT, RIGHT]],
  [[RIGHT, BOTTOM]],
  [
    [LEFT, TOP],
    [RIGHT, BOTTOM],
  ],
  [[TOP, BOTTOM]],
  [[LEFT, BOTTOM]],
  [[BOTTOM, LEFT]],
  [[TOP, BOTTOM]],
  [
    [TOP, RIGHT],
    [BOTTOM, LEFT],
  ],
  [[RIGHT, BOTTOM]],
  [[LEFT, RIGHT]],
  [[TOP, RIGHT]],
  [[LEFT, TOP]],
  [],
];

/** The outline of where values are at least `level`, as the data of an SVG path in pixels of the map. */
function contour(values, height, width, level) {
  const neighbours = new Map();
  const join = (one, other) => {
    if (neighbours.has(one)) neighbours.get(one).push(other);
    else neighbours.set(one, [other]);
  };
  for (let y = 0; y + 1 < height; y += 1) {
    for (let x = 0; x + 1 < width; x += 1) {
      const corner = y * width + x;
      const inside =
        (values[corner] >= level ? 1 : 0) |
        (values[corner + 1] >= level ? 2 : 0) |
        (values[corner + width + 1] >= level ? 4 : 0) |
        (values[corner + width] >= level ? 8 : 0);
      if (inside === 0 || inside === 15) continue;
      const edges = [2 * corner, 2 * (corner + 1) + 1, 2 * (corner + width), 2 * corner + 1];
      for (const [one, other] of JOINED[inside]) {
        join(edges[one], edges[other]);
        join(edges[other], edges[one]);
      }
    }
  }
  return chained(neighbours)
    .map((chain) => path(chain, values, width, level))
    .join("");
}

/** Edges in the order in which a line passes them; open lines first, so that none is begun in its middle. */
function chained(neighbours) {
  const chains = [];
  const passed = new Set();
  const follow = (start) => {
    const chain = [start];
    passed.add(start);
    let last = start;
    for (;;) {
      const next = neighbours.get(last).find((edge) => !passed.has(edge));
      if (next === undefined) break;
      passed.add(next);
      chain.push(next);
      last = next;
    }
    if (chain.length > 2 && neighbours.get(last).includes(start)) chain.push(start);
    chains.push(chain);
  };
  for (const [edge, others] of neighbours) if (others.length === 1 && !passed.has(edge)) follow(edge);
  for (const edge of neighbours.keys()) if (!passed.has(edge)) follow(edge);
  return chains;
}

function path(chain, values, width, level) {
  const points = chain.map((edge) => {
    const pixel = edge >> 1;
    const below = edge & 1;
    const from = values[pixel];
    const to = values[pixel + (below ? width : 1)];
    const share = (level - from) / (to - from);
    const x = (pixel % width) + 0.5 + (below ? 0 : share);
    const y = Math.floor(pixel / width) + 0.5 + (below ? share : 0);
    return `${+x.toFixed(2)} ${+y.toFixed(2)}`;
  });
  return `M${points.join("L")}`;
}
