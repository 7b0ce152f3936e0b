// Curves of every run, drawn by uPlot. Reads the JSON in #curve-data: {metrics: {name: label},
// arms: {arm: [colour, dash, width]}, runs: [{id, arm, size, seed, state, tokens: [], flops: [], <metric>: []}]}.
(() => {
  const data = JSON.parse(document.getElementById('curve-data').textContent);
  const box = document.getElementById('curves'), stage = box.querySelector('.stage');
  const field = (name) => box.querySelector(`[name=${name}]`);
  const dark = matchMedia('(prefers-color-scheme: dark)'), off = new Set();
  let plot = null;

  const ink = (hex) => { // on a dark page every colour is mixed with white, the darkest most
    if (!dark.matches) return hex;
    const rgb = [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
    const share = 0.85 - 0.65 * Math.max(...rgb) / 255;
    return `rgb(${rgb.map((v) => Math.round(v + (255 - v) * share)).join(',')})`;
  };
  const short = (v) => {
    const a = Math.abs(v);
    if (!a) return '0';
    for (const [scale, unit] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']])
      if (a >= scale && a < 1e12) return +(v / scale).toPrecision(3) + unit;
    return a >= 1e12 || a < 1e-3 ? v.toExponential(1).replace('e+', 'e') : String(+v.toPrecision(4));
  };
  // Mean of the points within half a window on either side; the window is a share of all points of the curve.
  const smooth = (y, share) => {
    const half = Math.round(share * y.length / 2);
    return half < 1 ? y : y.map((_, i) => {
      const near = y.slice(Math.max(0, i - half), i + half + 1);
      return near.reduce((a, b) => a + b) / near.length;
    });
  };
  const table = (run) => { // [x, y] of a run, without points that a log axis cannot show
    const x = run[field('x').value], y = run[field('metric').value];
    const kept = [...y.keys()].filter((i) => y[i] !== null && !(field('logx').checked && x[i] <= 0)
      && !(field('logy').checked && y[i] <= 0));
    return [kept.map((i) => x[i]), smooth(kept.map((i) => y[i]), +field('smooth').value)];
  };
  // The point of a curve that is nearest to the cursor: curves have points of their own in the common x.
  const nearest = (u, series, index, x) => {
    const xs = u.data[0], ys = u.data[series];
    let best = null;
    for (let i = 0; i < xs.length; i++)
      if (ys[i] != null && (best === null || Math.abs(xs[i] - x) < Math.abs(xs[best] - x))) best = i;
    return best === null ? index : best;
  };
  const crosses = (runs) => (u) => { // where diverged runs end
    u.ctx.fillStyle = '#e02020'; u.ctx.font = `${14 * devicePixelRatio}px sans-serif`; u.ctx.textAlign = 'center';
    runs.forEach((run, k) => {
      const ys = u.data[k + 1], last = ys.findLastIndex((y) => y != null);
      if (run.state === 'diverged' && last >= 0 && u.series[k + 1].show)
        u.ctx.fillText('✕', u.valToPos(u.data[0][last], 'x', true), u.valToPos(ys[last], 'y', true));
    });
  };
  // Touch: two fingers zoom, one moves what was zoomed; what lay under the fingers stays under them.
  const touch = (u) => {
    const fingers = new Map();
    let start = null;
    const place = () => {
      const p = [...fingers.values()], q = p[1] || p[0];
      return { x: (p[0][0] + q[0]) / 2, y: (p[0][1] + q[1]) / 2, d: Math.hypot(p[0][0] - q[0], p[0][1] - q[1]) || 1 };
    };
    const begin = () => {
      const { x, y } = u.scales;
      start = fingers.size ? { ...place(), count: fingers.size, scales: { x: [x.min, x.max], y: [y.min, y.max] } } : null;
    };
    const range = (key, from, to) => { // values at two shares of the axis as it was at the start
      const log = u.scales[key].distr === 3, [low, high] = start.scales[key].map((v) => (log ? Math.log(v) : v));
      const [min, max] = [from, to].map((share) => low + share * (high - low)).map((v) => (log ? Math.exp(v) : v));
      u.setScale(key, { min, max });
    };
    const put = (e) => {
      const r = u.over.getBoundingClientRect();
      fingers.set(e.pointerId, [e.clientX - r.left, e.clientY - r.top]);
      return r;
    };
    const end = (e) => { if (fingers.delete(e.pointerId)) begin(); };
    u.over.addEventListener('pointerdown', (e) => { if (e.pointerType !== 'mouse') { put(e); begin(); } });
    u.over.addEventListener('pointermove', (e) => {
      if (!fingers.has(e.pointerId)) return;
      const r = put(e), now = place(), f = start.count > 1 ? start.d / now.d : 1;
      const left = (start.x - now.x * f) / r.width, low = 1 - (start.y + (r.height - now.y) * f) / r.height;
      u.batch(() => { range('x', left, left + f); if (start.count > 1) range('y', low, low + f); });
    });
    for (const name of ['pointerup', 'pointercancel', 'pointerleave']) u.over.addEventListener(name, end);
  };

  function draw() {
    if (!stage.clientWidth) return; // in a closed section: drawn when it opens
    if (plot) plot.destroy();
    const size = field('size').value;
    const runs = data.runs.filter((r) => !off.has(r.arm) && (size === 'all' || r.size === size));
    const tables = runs.map(table), ink2 = dark.matches ? '#c8ccd2' : '#444', grid = dark.matches ? '#33373d' : '#e4e4e4';
    const axis = (label, space) => ({ label, space, stroke: ink2, grid: { stroke: grid, width: 1 },
      ticks: { stroke: grid, width: 1 }, values: (u, at) => at.map((v) => (v === null ? '' : short(v))) });
    const scale = (log) => (log ? { time: false, distr: 3, range: (u, low, high) => [low / 1.03, high * 1.03] } : { time: false });
    const series = runs.map((run) => {
      const [colour, dash, width] = data.arms[run.arm];
      return { label: `${run.arm}, ${run.size}, seed ${run.seed}`, stroke: ink(colour), dash, width,
        points: { show: false }, value: (u, v) => (v == null ? '–' : short(v)) };
    });
    plot = new uPlot({
      width: stage.clientWidth, height: stage.clientWidth < 500 ? 280 : 380,
      scales: { x: scale(field('logx').checked), y: scale(field('logy').checked) },
      axes: [axis(field('x').selectedOptions[0].text, 60), axis(field('metric').selectedOptions[0].text, 30)],
      series: [{ label: field('x').selectedOptions[0].text, value: (u, v) => (v == null ? '–' : short(v)) }, ...series],
      cursor: { dataIdx: nearest, drag: { x: true, y: true, uni: 20 }, focus: { prox: 24 } },
      focus: { alpha: 0.25 }, hooks: { init: [touch], draw: [crosses(runs)] },
    }, tables.length ? uPlot.join(tables) : [[]], stage);
  }

  box.querySelectorAll('select, input').forEach((one) => one.addEventListener('change', draw));
  box.querySelector('button.reset').addEventListener('click', draw);
  box.querySelectorAll('.key').forEach((key) => key.addEventListener('click', () => {
    const arm = key.dataset.arm;
    if (!off.delete(arm)) off.add(arm);
    key.setAttribute('aria-pressed', String(!off.has(arm)));
    draw();
  }));
  const recolour = () => {
    box.querySelectorAll('.key').forEach((key) => {
      key.querySelector('line').setAttribute('stroke', ink(data.arms[key.dataset.arm][0]));
    });
    draw();
  };
  dark.addEventListener('change', recolour);
  new ResizeObserver(() => { if (!plot || plot.width !== stage.clientWidth) draw(); }).observe(stage);
  recolour();
})();
