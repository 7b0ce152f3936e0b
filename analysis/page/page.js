// On a phone the sections that a reader may skip are closed; a link into one opens it.
if (matchMedia('(max-width: 600px)').matches) {
  document.querySelectorAll('details.section').forEach((section) => { section.open = false; });
}
const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === 'DETAILS') at.open = true;
  if (target) target.scrollIntoView();
};
addEventListener('hashchange', reveal);
reveal();

// Tables sort by the column whose head is clicked, or chosen by Enter: ascending, then descending.
document.querySelectorAll('table').forEach((table) => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, k) => { // the number that a cell begins with, else its text
    const text = row.cells[k].textContent.trim();
    const found = text.match(/^([-+]?[\d.]+(?:e[-+]?\d+)?)([kMG]?)(?=$|[\s%])/);
    return found ? +found[1] * ({ k: 1e3, M: 1e6, G: 1e9 }[found[2]] || 1) : text;
  };
  const order = (a, b) => (typeof a === 'number' && typeof b === 'number' ? a - b
    : typeof a === typeof b ? a.localeCompare(b, 'en', { numeric: true }) : typeof a === 'number' ? -1 : 1);
  heads.forEach((head, k) => {
    if (body.rows.length < 2) return;
    head.tabIndex = 0;
    head.setAttribute('aria-sort', 'none');
    const sort = () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach((other) => other.hasAttribute('aria-sort') && other.setAttribute('aria-sort', 'none'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const rows = [...body.rows].map((row) => [key(row, k), row]);
      rows.sort((a, b) => (up ? order(a[0], b[0]) : order(b[0], a[0]))).forEach(([, row]) => body.append(row));
    };
    head.addEventListener('click', sort);
    head.addEventListener('keydown', (e) => {
      if (e.key !== 'Enter' && e.key !== ' ') return;
      e.preventDefault();
      sort();
    });
  });
});
