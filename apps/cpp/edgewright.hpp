// Text from an Edgewright app folder (app.json, graphs, weights, tokenizer) by ONNX Runtime on the CPU.
//
//   edgewright::Model model("model");
//   std::cout << model.generate("k n i g h t").text << "\n";
//
// Whatever goes wrong is an edgewright::Error whose what() is one line that names the value and the way out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace edgewright {

using Token = std::int64_t;

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// How a token is drawn. temperature 0: the best one.
struct Sampling {
  double temperature = 0;
  double top_p = 1;
  double min_p = 0;
  std::size_t top_k = 0;
  double repetition_penalty = 1;
  std::size_t no_repeat_ngram = 0;
  std::uint64_t seed = 0;
};

// Why an answer ended: an end token, as many tokens as were asked for, no room left, a stop string, on_text said so.
enum class Ending { end, limit, context, stop, cancelled };
const char* name_of(Ending ending);

struct LoadOptions {
  int threads = 0;           // 0: as many as there are cores
  bool check_hashes = true;  // damaged weights load without an error, so every file is hashed first
};

// What a decoder-decoder made of a context; it serves any number of prompts of the same model.
struct Memory {
  std::size_t rows = 0;
  std::vector<float> values;  // [rows, hidden]
  std::string fingerprint;    // of the weights that made it

  void save(const std::filesystem::path& file) const;
  static Memory load(const std::filesystem::path& file);
};

// What a model of embeddings makes of a text.
struct Embedding {
  std::size_t size = 0;
  bool normalised = false;         // to length 1
  std::string similarity;          // "cosine", "dot", "euclidean" or "manhattan": how two vectors are compared
  std::vector<std::string> prompts;  // names of what may be put before a text
};

struct GenerateOptions {
  std::optional<std::size_t> max_new_tokens;  // default: the model's own
  std::optional<Sampling> sampling;           // default: as the model's makers have it
  std::vector<std::string> stops;             // strings that end the answer; not part of it
  bool chat = true;                           // through the chat template, where the model has one
  const Memory* memory = nullptr;             // of a decoder-decoder
  // Is given each piece of text when it is whole characters; false cancels the answer.
  std::function<bool(std::string_view)> on_text;
};

struct Answer {
  std::string text;
  std::vector<Token> tokens;
  Ending ending = Ending::end;
  std::size_t prompt_tokens = 0;
  double first_seconds = 0;  // until the first token
  double seconds = 0;        // from then on
};

// What app.json says of the model.
struct Info {
  std::string name;
  std::string task;  // "seq2seq", "causal", "memory" or "embed"
  std::string fingerprint;
  std::size_t vocab = 0;
  std::size_t max_context = 0;
  std::size_t max_new_tokens = 0;
  std::size_t memory_bytes = 0;
  std::vector<Token> stops;
  Sampling sampling;
  bool has_tokenizer = false;
  std::optional<Embedding> embedding;  // of the task "embed"
};

struct ModelState;
struct StreamState;

// One answer under way, token by token: for loops of your own. It must not outlive its model.
class Stream {
 public:
  explicit Stream(std::unique_ptr<StreamState> state);
  ~Stream();
  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;

  // Reads the prompt; the logits [vocab] of what comes next. They are valid until the next call.
  std::span<const float> prefill();
  // Appends a token; the logits of what comes next. Throws Error where the context is full.
  std::span<const float> feed(Token token);
  std::size_t past() const;      // positions read
  std::size_t capacity() const;  // positions that there are

 private:
  std::unique_ptr<StreamState> state_;
};

class Model {
 public:
  // Opens the folder that app.json lies in. Throws Error.
  explicit Model(const std::filesystem::path& folder, const LoadOptions& options = {});
  ~Model();
  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;

  // The text that follows a prompt. A model answers one prompt at a time: a second call meanwhile throws Error.
  Answer generate(std::string_view prompt, const GenerateOptions& options = {});
  Answer generate(std::span<const Token> prompt, const GenerateOptions& options = {});

  // The memory of a context, for a decoder-decoder.
  Memory read_context(std::string_view context);
  Memory read_context(std::span<const Token> context);

  // The vector of a text, or of token ids, for a model of embeddings. prompt_name: of the model's own prompts; none is its default.
  std::vector<float> embed(std::string_view text, const std::optional<std::string>& prompt_name = std::nullopt);
  std::vector<float> embed(std::span<const Token> tokens);
  // The tokens that `embed` reads: what is too long is cut.
  std::vector<Token> read_text(std::string_view text, const std::optional<std::string>& prompt_name = std::nullopt) const;

  // The tokens of a prompt, with what stands around it; `tokens` and `text` are the tokenizer alone.
  std::vector<Token> read_prompt(std::string_view prompt, bool chat = true) const;
  std::vector<Token> tokens(std::string_view text) const;
  std::string text(std::span<const Token> tokens) const;

  Stream start(std::span<const Token> prompt, std::size_t new_tokens, const Memory* memory = nullptr);
  const Info& info() const;

 private:
  std::unique_ptr<ModelState> state_;
};

}  // namespace edgewright
