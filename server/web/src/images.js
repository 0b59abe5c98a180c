// Images to send: made small here, for the browser keeps them with the conversation and has a few megabytes.
const MOST_PIXELS = 1_000_000; // more than a model sees of one
export const KINDS = "image/png,image/jpeg,image/webp,image/gif";

// A file as the data: URL of a JPEG. Throws for a file that is no image.
export async function shrunk(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // behind what is transparent: a JPEG has no other
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.9);
}
