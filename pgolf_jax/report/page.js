(() => {
  const root = document.documentElement;
  const key = "pgolf-report-theme";
  const stored = () => { try { return localStorage.getItem(key); } catch { return null; } };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = (theme) => { theme ? (root.dataset.theme = theme) : delete root.dataset.theme; };
  apply(stored());
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
    const next = isDark ? "light" : "dark";
    apply(next);
    try { localStorage.setItem(key, next); } catch { /* a page opened from a file may have no storage */ }
  });
})();
