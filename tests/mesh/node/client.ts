// Calls a gateway with stubs that ts-proto made of protos/, and prints what came as JSON.
//
// node out/client.js ADDRESS TEXT...
import { credentials, type ServiceError } from "@grpc/grpc-js";
import { Dtype, type EmbedResult } from "./gen/embedmesh/v1/embedding";
import { ListModelsRequest, ModelCatalogClient } from "./gen/embedmesh/v1/catalog";
import { EmbedRequest, type EmbedResponse, EmbedStreamRequest, GatewayClient } from "./gen/embedmesh/v1/gateway";

const [address, ...texts] = process.argv.slice(2);
const MESSAGE_BYTES = 64 * 2 ** 20;
const options = { "grpc.max_receive_message_length": MESSAGE_BYTES, "grpc.max_send_message_length": MESSAGE_BYTES };
const gateway = new GatewayClient(address, credentials.createInsecure(), options);
const catalog = new ModelCatalogClient(address, credentials.createInsecure(), options);

const request = EmbedRequest.fromPartial({
  inputs: texts.map((text) => ({ text: { text } })),
  output: { dtype: Dtype.DTYPE_FLOAT32 },
});

function vector(result: EmbedResult): number[] {
  const { shape, data } = result.embedding!.dense!;
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  return Array.from({ length: shape[0] }, (_, i) => view.getFloat32(4 * i, true));
}

function outcomes(response: EmbedResponse) {
  return response.results.map((result) =>
    result.error
      ? { code: result.error.code, details: result.error.details.map((detail) => detail.typeUrl) }
      : { vector: vector(result), space: response.models[result.modelIndex].space },
  );
}

function embed(): Promise<EmbedResponse> {
  return new Promise((resolve, reject) =>
    gateway.embed(request, (error: ServiceError | null, response) => (error ? reject(error) : resolve(response))),
  );
}

function embedStream(): Promise<Map<number, EmbedResponse>> {
  return new Promise((resolve, reject) => {
    const answers = new Map<number, EmbedResponse>();
    const call = gateway.embedStream();
    call.on("data", (message) => answers.set(message.sequence, message.response));
    call.on("error", reject);
    call.on("end", () => resolve(answers));
    for (const sequence of [5, 6]) {
      call.write(EmbedStreamRequest.fromPartial({ sequence, request }));
    }
    call.end();
  });
}

function models(): Promise<string[]> {
  return new Promise((resolve, reject) =>
    catalog.listModels(ListModelsRequest.create(), (error, response) =>
      error ? reject(error) : resolve(response.models.map((info) => info.model!.name)),
    ),
  );
}

async function main(): Promise<void> {
  const [unary, stream, names] = await Promise.all([embed(), embedStream(), models()]);
  const chunks = Object.fromEntries([...stream].map(([sequence, response]) => [sequence, outcomes(response)]));
  console.log(JSON.stringify({ unary: outcomes(unary), stream: chunks, models: names }));
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
