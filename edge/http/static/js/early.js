// Runs before the page is drawn, so that a chosen theme does not begin with a flash of the other one.

try {
  const theme = localStorage.getItem("qwedge.theme");
  const sheet = document.getElementById("dark-colours");
  if (theme === "dark") sheet.media = "all";
  if (theme === "light") sheet.media = "not all";
} catch {
  // Storage is forbidden: the theme is the system's.
}
