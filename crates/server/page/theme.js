// Runs before the first paint, so that a chosen theme does not flash.
try {
  const theme = localStorage.getItem("marlin.theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is forbidden: the system's theme stays.
}
