// Does it work at all: a few calls of every modality for ten seconds.
import { embed, newAudio, newImage, newTexts, steady, thresholds } from './lib.js';

export const options = { scenarios: { smoke: steady('10s') }, thresholds };

export default function () {
  embed([...newTexts(1), newImage(), newAudio()]);
}
