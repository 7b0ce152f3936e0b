// Zoomable training curves. Reads the JSON in #curve-data: {metrics: {name: label}, arms: {arm: [colour, dash]},
// runs: [{id, arm, size, seed, state, tokens: [], flops: [], <metric>: []}]}. Drag: zoom. Double click: reset.
(() => {
  const data = JSON.parse(document.getElementById('curve-data').textContent);
  const box = document.getElementById('curves');
  const canvas = box.querySelector('canvas'), at = box.querySelector('.at');
  const pick = (name) => box.querySelector(`select[name=${name}]`);
  const off = new Set();
  let zoom = null, drag = null, shown = [];

  const series = () => {
    const metric = pick('metric').value, x = pick('x').value, size = pick('size').value;
    return data.runs.filter((r) => !off.has(r.arm) && (size === 'all' || r.size === size)).map((r) => ({
      run: r, points: r[metric].map((y, i) => [r[x][i], y]).filter((p) => p[0] > 0 && p[1] !== null),
    })).filter((s) => s.points.length);
  };
  const short = (v) => {
    if (v === 0) return '0';
    const a = Math.abs(v);
    for (const [scale, unit] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']])
      if (a >= scale && a < 1e12) return +(v / scale).toPrecision(3) + unit;
    return a >= 1e12 || a < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(3));
  };
  const ticks = (low, high, log) => {
    if (log) {
      const out = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
        for (const m of Math.log10(high / low) > 2 ? [1] : [1, 2, 5])
          if (m * 10 ** e >= low && m * 10 ** e <= high) out.push(m * 10 ** e);
      return out;
    }
    const raw = (high - low) / 5, e = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((m) => m * e >= raw) * e, out = [];
    for (let v = Math.ceil(low / step) * step; v <= high; v += step) out.push(Math.abs(v) < step / 1e6 ? 0 : v);
    return out;
  };

  function draw() {
    const ratio = window.devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
    canvas.width = w * ratio; canvas.height = h * ratio;
    const g = canvas.getContext('2d');
    g.scale(ratio, ratio); g.clearRect(0, 0, w, h); g.font = '12px system-ui, sans-serif';
    shown = series();
    const all = shown.flatMap((s) => s.points);
    if (!all.length) { g.fillText('Nothing to show.', 20, 30); return; }
    const logx = pick('x').value === 'flops', logy = pick('metric').value.includes('grad_norm');
    const fx = logx ? Math.log10 : (v) => v, fy = logy ? (v) => Math.log10(Math.max(v, 1e-30)) : (v) => v;
    const span = (f, k) => {
      let low = Infinity, high = -Infinity;
      for (const p of all) { const v = f(p[k]); if (v < low) low = v; if (v > high) high = v; }
      const pad = (high - low) * 0.03 || 0.1;
      return [low - pad, high + pad];
    };
    const [x0, x1] = zoom ? zoom.x : span(fx, 0), [y0, y1] = zoom ? zoom.y : span(fy, 1);
    const left = 48, right = w - 8, top = 8, bottom = h - 38;
    const px = (v) => left + (fx(v) - x0) / (x1 - x0) * (right - left);
    const py = (v) => bottom - (fy(v) - y0) / (y1 - y0) * (bottom - top);
    draw.inverse = (cx, cy) => [x0 + (cx - left) / (right - left) * (x1 - x0), y0 + (bottom - cy) / (bottom - top) * (y1 - y0)];
    draw.px = px; draw.py = py;
    g.strokeStyle = '#e4e4e4'; g.fillStyle = '#444'; g.lineWidth = 1; g.textAlign = 'center';
    let last = -1e9;
    for (const v of ticks(logx ? 10 ** x0 : x0, logx ? 10 ** x1 : x1, logx)) {
      const q = px(v); g.beginPath(); g.moveTo(q, top); g.lineTo(q, bottom); g.stroke();
      if (q - last > 44) { g.fillText(short(v), q, bottom + 15); last = q; }
    }
    g.textAlign = 'right';
    for (const v of ticks(logy ? 10 ** y0 : y0, logy ? 10 ** y1 : y1, logy)) {
      const q = py(v); g.beginPath(); g.moveTo(left, q); g.lineTo(right, q); g.stroke(); g.fillText(short(v), left - 5, q + 4);
    }
    g.textAlign = 'center';
    g.fillText(logx ? 'training FLOPs' : 'training tokens', (left + right) / 2, h - 6);
    g.save(); g.beginPath(); g.rect(left, top, right - left, bottom - top); g.clip();
    for (const s of shown) {
      const [colour, dash] = data.arms[s.run.arm];
      g.strokeStyle = colour; g.setLineDash(dash); g.lineWidth = 1.4; g.beginPath();
      s.points.forEach((p, i) => (i ? g.lineTo(px(p[0]), py(p[1])) : g.moveTo(px(p[0]), py(p[1]))));
      g.stroke(); g.setLineDash([]);
      if (s.run.state === 'diverged') {
        const p = s.points[s.points.length - 1];
        g.fillStyle = '#d00000'; g.fillText('✕', px(p[0]), py(p[1]) + 4); g.fillStyle = '#444';
      }
    }
    if (drag && drag.to) {
      g.fillStyle = 'rgba(11,83,148,.12)';
      g.fillRect(drag.from[0], drag.from[1], drag.to[0] - drag.from[0], drag.to[1] - drag.from[1]);
    }
    g.restore();
  }

  const place = (e) => { const b = canvas.getBoundingClientRect(); return [e.clientX - b.left, e.clientY - b.top]; };
  canvas.addEventListener('pointerdown', (e) => { if (e.pointerType === 'mouse') drag = { from: place(e) }; });
  canvas.addEventListener('pointermove', (e) => {
    const here = place(e);
    if (drag) { drag.to = here; draw(); return; }
    let best = null, distance = 400;
    for (const s of shown) for (const p of s.points) {
      const d = (draw.px(p[0]) - here[0]) ** 2 + (draw.py(p[1]) - here[1]) ** 2;
      if (d < distance) { distance = d; best = [s.run, p]; }
    }
    at.textContent = best ? `${best[0].arm}, ${best[0].size}, seed ${best[0].seed} (run ${best[0].id}): ${best[1][1]} at ${short(best[1][0])}` : '';
  });
  window.addEventListener('pointerup', () => {
    if (drag && drag.to && Math.abs(drag.to[0] - drag.from[0]) > 8 && Math.abs(drag.to[1] - drag.from[1]) > 8) {
      const a = draw.inverse(...drag.from), b = draw.inverse(...drag.to), sort = (u, v) => (u < v ? [u, v] : [v, u]);
      zoom = { x: sort(a[0], b[0]), y: sort(a[1], b[1]) };
    }
    drag = null; draw();
  });
  const reset = () => { zoom = null; draw(); };
  canvas.addEventListener('dblclick', reset);
  box.querySelector('button.reset').addEventListener('click', reset);
  box.querySelectorAll('select').forEach((s) => s.addEventListener('change', reset));
  box.querySelectorAll('.key').forEach((k) => k.addEventListener('click', () => {
    const arm = k.dataset.arm;
    if (off.has(arm)) off.delete(arm); else off.add(arm);
    k.classList.toggle('off'); k.setAttribute('aria-pressed', String(!off.has(arm))); draw();
  }));
  window.addEventListener('resize', draw);
  draw();
})();
