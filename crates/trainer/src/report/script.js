// Draws the charts anew in the width that they have: values under the pointer, zoom by dragging,
// a logarithmic axis or a linear one. Without it the page shows them as they were written.
(() => {
  const left = 58, right = 18, top = 8, bottom = 22;
  const thousands = n => Math.round(n).toLocaleString('en-US');
  const shown = v => v && Math.abs(v) < .01 ? v.toExponential(3) : Math.abs(v) < 100 ? v.toFixed(4) : thousands(v);
  const label = v => !v ? '0' : Math.abs(v) < 1e-3 ? (+v.toPrecision(3)).toExponential() : Math.abs(v) < 100 ? String(+v.toFixed(4)) : thousands(v);
  const ticks = (low, high, most) => {
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough)), found = [];
    const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough * .999) || power;
    for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
    return found;
  };
  const powers = (low, high) => {
    const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high)), found = [];
    for (let power = from; power <= to; power++)
      for (const n of to - from > 3 ? [1] : [1, 2, 5]) found.push(n * 10 ** power);
    return found.filter(n => n >= low * .999 && n <= high * 1.001);
  };
  const remember = (key, value) => {
    try {
      if (value === undefined) return sessionStorage.getItem(key);
      sessionStorage.setItem(key, value);
    } catch { return null; }
  };
  const charts = [...document.querySelectorAll('figure.chart')].map(figure => {
    const svg = figure.querySelector('svg'), caption = figure.querySelector('figcaption');
    const title = svg.getAttribute('aria-label'), note = caption.querySelector('small');
    let log = 'log' in figure.dataset, range = null, from = null, scale = null;
    const lines = [...svg.querySelectorAll('.line')].map((path, n) => ({
      classes: path.getAttribute('class'), name: path.dataset.name, dots: 'dots' in path.dataset, off: false,
      legend: caption.querySelectorAll('span')[n],
      points: path.getAttribute('d').slice(1).split('L').map(point => point.split(' ').map(Number))
        .map(([step, value]) => [step, log ? 10 ** value : value]),
    }));
    const can = lines.every(line => line.points.every(point => point[1] > 0));
    if (can && remember(title)) log = remember(title) === 'log';
    const add = (name, attributes, text) => {
      const made = document.createElementNS('http://www.w3.org/2000/svg', name);
      for (const key in attributes) made.setAttribute(key, attributes[key]);
      if (text) made.textContent = text;
      return svg.appendChild(made);
    };
    const button = (text, press) => {
      const made = document.createElement('button');
      made.type = 'button';
      made.textContent = text;
      made.onclick = press;
      return caption.appendChild(made);
    };
    const draw = () => {
      const width = Math.max(240, figure.clientWidth), height = Math.min(280, Math.max(170, width * .4));
      const seen = lines.filter(line => !line.off).map(line => ({ ...line, points: line.points.filter(
        point => !range || point[0] >= range[0] && point[0] <= range[1]) }));
      const all = seen.flatMap(line => line.points);
      svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
      svg.replaceChildren();
      scale = null;
      if (!all.length) return;
      const [first, end] = range || all.reduce(([a, b], [s]) => [Math.min(a, s), Math.max(b, s)], [1 / 0, -1 / 0]);
      const last = end > first ? end : first + 1;
      let [low, high] = all.reduce(([a, b], [, v]) => [Math.min(a, v), Math.max(b, v)], [1 / 0, -1 / 0]);
      const bent = log && low > 0;
      if (!bent && low > 0 && (low < high / 2 || low === high)) low = 0;
      if (high <= low) high = low ? low + Math.abs(low) * .1 : 1;
      const f = v => bent ? Math.log10(v) : v;
      const x = s => left + (s - first) / (last - first) * (width - left - right);
      const y = v => height - bottom - (f(v) - f(low)) / (f(high) - f(low)) * (height - bottom - top);
      scale = { x, y, width, height, first, last, seen };
      for (const tick of bent ? powers(low, high) : ticks(low, high, 5)) {
        add('path', { class: 'grid', d: `M${left} ${y(tick).toFixed(1)}H${width - right}` });
        add('text', { class: 'y', x: left - 7, y: y(tick) + 4 }, label(tick));
      }
      for (const tick of ticks(first, last, Math.max(2, width / 110)).filter(Number.isInteger))
        add('text', { class: 'x', x: x(tick), y: height - 5 }, thousands(tick));
      for (const line of seen) {
        const d = line.points.map(([s, v]) => `${x(s).toFixed(1)} ${y(v).toFixed(1)}`).join('L');
        if (d) add('path', { class: line.classes, d: 'M' + d });
        if (line.dots || line.points.length === 1)
          for (const [s, v] of line.points) add('circle', { class: line.classes.split(' ')[1], cx: x(s), cy: y(v), r: 3 });
      }
      note.textContent = bent ? 'logarithmic' : '';
      bend.textContent = bent ? 'linear axis' : 'logarithmic axis';
      whole.hidden = !range;
    };
    const bend = button('', () => { log = !log; remember(title, log ? 'log' : 'linear'); draw(); });
    bend.hidden = !can;
    const whole = button('all steps', () => { range = null; draw(); });
    const tip = figure.appendChild(document.createElement('div'));
    tip.className = 'tip';
    const marks = () => svg.querySelectorAll('.mark').forEach(mark => mark.remove());
    const leave = () => { marks(); tip.style.display = 'none'; };
    const at = event => {
      const box = svg.getBoundingClientRect();
      const part = ((event.clientX - box.left) * scale.width / box.width - left) / (scale.width - left - right);
      return scale.first + Math.min(1, Math.max(0, part)) * (scale.last - scale.first);
    };
    const point = event => {
      if (!scale) return;
      marks();
      const step = at(event), rows = [];
      for (const line of scale.seen) {
        const near = line.points.reduce((best, p) => !best || Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best, null);
        if (near) rows.push([line, near]);
      }
      if (!rows.length) return;
      const nearest = rows.reduce((a, b) => Math.abs(b[1][0] - step) < Math.abs(a[1][0] - step) ? b : a)[1][0];
      if (from !== null) {
        const [a, b] = [scale.x(from), scale.x(step)].sort((a, b) => a - b);
        add('rect', { class: 'mark zoom', x: a, y: top, width: b - a, height: scale.height - top - bottom });
      }
      add('path', { class: 'mark grid', d: `M${scale.x(nearest)} ${top}V${scale.height - bottom}` });
      tip.replaceChildren(`step ${thousands(nearest)}`);
      for (const [line, [s, v]] of rows) {
        add('circle', { class: 'mark ' + line.classes.split(' ')[1], cx: scale.x(s), cy: scale.y(v), r: 3.5 });
        const row = tip.appendChild(document.createElement('div')), name = row.appendChild(document.createElement('span'));
        name.className = line.classes.split(' ')[1];
        name.textContent = line.name;
        row.append(` ${shown(v)}${s === nearest ? '' : ` at ${thousands(s)}`}`);
      }
      const share = scale.x(nearest) / scale.width, box = svg.getBoundingClientRect(), own = figure.getBoundingClientRect();
      tip.style.display = 'block';
      tip.style.top = `${box.top - own.top + 12}px`;
      tip.style.left = share < .5 ? `calc(${share * 100}% + 12px)` : 'auto';
      tip.style.right = share < .5 ? 'auto' : `calc(${100 - share * 100}% + 12px)`;
    };
    svg.classList.add('live');
    svg.onpointerdown = event => { if (scale && !event.button) from = at(event); };
    svg.onpointermove = point;
    svg.onpointerleave = () => { from = null; leave(); };
    svg.onpointerup = event => {
      if (from === null || !scale) return;
      const ends = [from, at(event)].sort((a, b) => a - b);
      from = null;
      if (ends[1] - ends[0] > (scale.last - scale.first) / 50) range = ends;
      draw();
      point(event);
    };
    svg.ondblclick = () => { range = null; draw(); };
    lines.forEach(line => {
      if (line.legend && lines.length > 1) line.legend.onclick = () => {
        line.off = !line.off;
        line.legend.classList.toggle('off', line.off);
        draw();
      };
    });
    draw();
    return { draw, zoomed: () => range };
  });
  addEventListener('resize', () => charts.forEach(chart => chart.draw()));
  const refresh = document.documentElement.dataset.refresh;
  if (refresh) setInterval(() => {
    if (!document.hidden && !charts.some(chart => chart.zoomed())) location.reload();
  }, refresh * 1000);
})();
