// Runs before the page is painted, so that a chosen theme does not flash.
try {
  const { theme } = JSON.parse(localStorage.getItem("glm.preferences") ?? "{}");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is closed to this page: the system's theme stays.
}
