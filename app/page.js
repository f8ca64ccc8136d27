// What the pointer says of a token: how it came about, and in which pass. Pictures carry their tokens in data-tokens.
(() => {
  const ways = window.arsdWays;
  const parsed = new WeakMap();
  const read = (canvas) => {
    const text = canvas.dataset.tokens;
    const known = parsed.get(canvas);
    if (known && known.text === text) return known.value;
    const value = JSON.parse(text);
    parsed.set(canvas, { text, value });
    return value;
  };
  document.addEventListener("pointermove", (event) => {
    const canvas = event.target.closest ? event.target.closest(".arsd-canvas[data-tokens]") : null;
    if (!canvas) return;
    const { columns, kinds, when } = read(canvas);
    const rows = kinds.length / columns;
    const box = canvas.getBoundingClientRect();
    const x = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const y = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    const at = y * columns + x;
    const tip = canvas.querySelector(".arsd-tip");
    if (tip) tip.textContent = `row ${y + 1}, column ${x + 1}: ${ways[kinds[at]] || "undecided"}, pass ${when[at] + 1}`;
  });
})();
