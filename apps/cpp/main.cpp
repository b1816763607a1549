// The command line over edgewright.hpp: answers a prompt, checks the golden traces, measures.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "edgewright.hpp"

namespace {

using Json = nlohmann::json;
namespace ew = edgewright;

const char* const kUsage =
    "edgewright-app [--model DIR] WHAT\n"
    "  --prompt TEXT             answer it; '-' reads standard input\n"
    "  --ids 5,6,7               answer token ids, and print token ids\n"
    "  --embed TEXT              the vector of a text, as a line of JSON; of '-' one of each line of standard input; --prompt-name NAME\n"
    "  --context FILE            text that a decoder-decoder reads first; --save-memory FILE keeps what it made of it\n"
    "  --memory FILE             a memory that was kept\n"
    "  --trace FILE              check the golden traces (traces.json)\n"
    "  --bench [--pp N] [--tg N] [--repeats N]   tokens a second: reading N tokens, generating N tokens\n"
    "  --max-new-tokens N  --temperature T  --top-k N  --top-p P  --seed N  --stop TEXT  --no-chat  --no-check  --threads N\n";

struct Arguments {
  std::map<std::string, std::string> given;
  std::vector<std::string> stops;

  Arguments(int count, char** words) {
    const std::vector<std::string> flags = {"--bench", "--no-chat", "--no-check", "--help"};
    const std::vector<std::string> options = {"--model", "--prompt", "--ids", "--embed", "--prompt-name", "--context", "--memory", "--save-memory", "--trace", "--pp", "--tg", "--repeats",
                                              "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop", "--threads"};
    const std::vector<std::string> all(words + 1, words + count);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (std::find(flags.begin(), flags.end(), all[i]) != flags.end()) {
        given[all[i]] = "";
      } else if (std::find(options.begin(), options.end(), all[i]) != options.end()) {
        if (i + 1 == all.size()) throw ew::Error(all[i] + " needs a value (see --help)");
        if (all[i] == "--stop") stops.push_back(all[i + 1]);
        given[all[i]] = all[i + 1];
        ++i;
      } else {
        throw ew::Error("there is no option " + all[i] + " (see --help)");
      }
    }
  }

  bool has(const std::string& name) const { return given.contains(name); }

  std::string text(const std::string& name, const std::string& otherwise) const {
    const auto found = given.find(name);
    return found == given.end() ? otherwise : found->second;
  }

  double number(const std::string& name, double otherwise) const {
    if (!has(name)) return otherwise;
    const std::string& word = given.at(name);
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (word.empty() || *end != '\0' || !(value >= 0 && value < 1e15)) throw ew::Error(name + " " + word + " is no number from 0");
    return value;
  }

  std::size_t count(const std::string& name, std::size_t otherwise) const { return static_cast<std::size_t>(number(name, static_cast<double>(otherwise))); }
};

std::string whole(std::istream& in) { return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()}; }

std::string whole_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw ew::Error(path + " cannot be read");
  return whole(file);
}

std::vector<ew::Token> ids_of(const std::string& text) {
  const Json list = Json::parse("[" + text + "]", nullptr, false);
  if (!list.is_array() || !std::all_of(list.begin(), list.end(), [](const Json& id) { return id.is_number_unsigned(); }))
    throw ew::Error("--ids " + text + " are no token ids; write 5,6,7");
  return list.get<std::vector<ew::Token>>();
}

void answer(ew::Model& model, const Arguments& arguments) {
  ew::GenerateOptions options;
  options.stops = arguments.stops;
  options.chat = !arguments.has("--no-chat");
  if (arguments.has("--max-new-tokens")) options.max_new_tokens = arguments.count("--max-new-tokens", 0);
  ew::Sampling sampling = model.info().sampling;
  sampling.temperature = arguments.number("--temperature", sampling.temperature);
  sampling.top_k = arguments.count("--top-k", sampling.top_k);
  sampling.top_p = arguments.number("--top-p", sampling.top_p);
  sampling.seed = arguments.count("--seed", 0);
  options.sampling = sampling;
  ew::Memory memory;
  if (arguments.has("--memory")) {
    memory = ew::Memory::load(arguments.text("--memory", ""));
    options.memory = &memory;
  } else if (arguments.has("--context")) {
    memory = model.read_context(whole_file(arguments.text("--context", "")));
    options.memory = &memory;
    if (arguments.has("--save-memory")) memory.save(arguments.text("--save-memory", ""));
  }
  ew::Answer said;
  if (arguments.has("--ids")) {
    said = model.generate(ids_of(arguments.text("--ids", "")), options);
    for (std::size_t i = 0; i < said.tokens.size(); ++i) std::cout << (i > 0 ? "," : "") << said.tokens[i];
  } else {
    options.on_text = [](std::string_view piece) { return static_cast<bool>(std::cout << piece << std::flush); };
    const std::string prompt = arguments.text("--prompt", "");
    said = model.generate(prompt == "-" ? whole(std::cin) : prompt, options);
  }
  std::cout << std::endl;
  std::cerr << said.prompt_tokens << " tokens read in " << said.first_seconds << " s, " << said.tokens.size() << " written in " << said.seconds
            << " s; ended by: " << ew::name_of(said.ending) << "\n";
}

// Feeds the recorded tokens; the best token of each step must be the recorded one, or nearly as good by the recording.
bool check_case(ew::Model& model, const Json& recorded, std::size_t number, std::size_t new_tokens, double tolerance, double& largest) {
  ew::Memory memory;
  const auto context = recorded.at("context").get<std::vector<ew::Token>>();
  if (!context.empty()) memory = model.read_context(context);
  const auto ids = recorded.at("ids").get<std::vector<ew::Token>>();
  std::vector<ew::Token> said;
  {
    ew::Stream stream = model.start(ids, new_tokens, context.empty() ? nullptr : &memory);
    std::span<const float> logits = stream.prefill();
    const Json& steps = recorded.at("steps");
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const auto wanted = steps[i].at("token").get<ew::Token>();
      const ew::Token best = std::max_element(logits.begin(), logits.end()) - logits.begin();
      double margin = steps[i].at("top").at(0).at(1).get<double>() - steps[i]["top"].back().at(1).get<double>();  // at least
      for (const Json& entry : steps[i]["top"]) {
        const double here = static_cast<double>(logits[entry.at(0).get<std::size_t>()]);
        largest = std::max(largest, std::abs(here - entry.at(1).get<double>()));
        if (entry.at(0) == best) margin = steps[i]["top"][0][1].get<double>() - entry[1].get<double>();
      }
      if (best != wanted && margin > tolerance) {
        std::cerr << "trace " << number << ", step " << i << ": token " << best << ", recorded " << wanted << " (margin " << margin << ")\n";
        return false;
      }
      const bool ends = i + 1 == steps.size();
      if (!ends || recorded.at("ending") != "end") said.push_back(wanted);
      if (!ends) logits = stream.feed(wanted);
    }
  }
  if (!recorded.at("text").is_null() && model.text(said) != recorded["text"].get<std::string>()) {
    std::cerr << "trace " << number << ": the text is " << Json(model.text(said)).dump() << ", recorded " << recorded["text"].dump() << "\n";
    return false;
  }
  return true;
}

// Of a model of embeddings: no number may be further off than the tolerance.
bool check_vector(ew::Model& model, const Json& recorded, std::size_t number, double tolerance, double& largest) {
  const auto ids = recorded.at("ids").get<std::vector<ew::Token>>();
  const auto vector = recorded.at("vector").get<std::vector<double>>();
  const std::vector<float> here = model.embed(ids);
  double apart = here.size() == vector.size() ? 0 : tolerance + 1;
  for (std::size_t i = 0; i < std::min(here.size(), vector.size()); ++i) apart = std::max(apart, std::abs(static_cast<double>(here[i]) - vector[i]));
  largest = std::max(largest, apart);
  const bool same_tokens = recorded.at("text").is_null() || model.read_text(recorded["text"].get<std::string>()) == ids;
  if (!same_tokens) std::cerr << "vector " << number << ": other tokens than recorded\n";
  if (!(apart <= tolerance)) std::cerr << "vector " << number << ": " << apart << " apart from the recorded one\n";
  return same_tokens && apart <= tolerance;
}

bool check_text(const ew::Model& model, const Json& recorded) {
  const auto text = recorded.at("text").get<std::string>();
  const std::vector<ew::Token> ids = model.tokens(text);
  const std::string back = model.text(recorded.at("ids").get<std::vector<ew::Token>>());
  const bool same = ids == recorded.at("ids").get<std::vector<ew::Token>>() && back == recorded.at("decoded").get<std::string>();
  if (!same) std::cerr << "text " << recorded["text"].dump() << ": tokens " << Json(ids).dump() << ", recorded " << recorded["ids"].dump() << "; text " << Json(back).dump() << "\n";
  return same;
}

bool check_traces(ew::Model& model, const std::string& file) {
  const Json traces = Json::parse(whole_file(file), nullptr, false);
  if (traces.is_discarded()) throw ew::Error(file + " is no JSON; embed the bundle again");
  std::size_t right = 0, number = 0, texts = 0;
  double largest = 0;
  for (const Json& recorded : traces.at("cases"))
    right += check_case(model, recorded, number++, traces.at("new_tokens").get<std::size_t>(), traces.at("tolerance").get<double>(), largest) ? 1 : 0;
  for (const Json& recorded : traces.value("vectors", Json::array()))
    right += check_vector(model, recorded, number++, traces.at("tolerance").get<double>(), largest) ? 1 : 0;
  for (const Json& recorded : traces.at("texts")) texts += check_text(model, recorded) ? 1 : 0;
  std::cout << right << " of " << number << " traces, " << texts << " of " << traces["texts"].size() << " texts; " << (model.info().embedding ? "vectors" : "logits") << " differ by at most " << largest << "\n";
  return right == number && texts == traces["texts"].size();
}

void row(const std::string& test, std::size_t tokens, std::size_t repeats, const std::function<double()>& seconds) {
  seconds();  // the first run does not count
  std::vector<double> rates;
  for (std::size_t i = 0; i < repeats; ++i) rates.push_back(static_cast<double>(tokens) / seconds());
  const double mean = std::accumulate(rates.begin(), rates.end(), 0.0) / static_cast<double>(rates.size());
  double squares = 0;
  for (const double rate : rates) squares += (rate - mean) * (rate - mean);
  std::cout << "| " << test << " | " << mean << " ± " << std::sqrt(squares / static_cast<double>(rates.size())) << " |" << std::endl;
}

// pp: tokens of a prompt read a second. tg: tokens generated a second, behind a prompt of one token.
void bench(ew::Model& model, const Arguments& arguments) {
  const std::size_t most = model.info().max_context - 1, repeats = std::max<std::size_t>(1, arguments.count("--repeats", 5));
  const std::size_t pp = std::clamp<std::size_t>(arguments.count("--pp", 512), 1, most), tg = std::clamp<std::size_t>(arguments.count("--tg", 128), 1, most - 1);
  const auto token = static_cast<ew::Token>(model.info().vocab / 2);
  const auto since = [](std::chrono::steady_clock::time_point began) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(); };
  std::cout << "| " << model.info().name << " | tokens/s |\n|---|---|\n";
  row("pp" + std::to_string(pp), pp, repeats, [&] {
    const auto began = std::chrono::steady_clock::now();
    if (model.info().embedding) {
      model.embed(std::vector<ew::Token>(pp, token));
    } else {
      model.start(std::vector<ew::Token>(pp, token), 1).prefill();
    }
    return since(began);
  });
  if (model.info().embedding) return;
  row("tg" + std::to_string(tg), tg, repeats, [&] {
    ew::Stream stream = model.start(std::vector<ew::Token>(1, token), tg + 1);
    stream.prefill();
    const auto began = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i < tg; ++i) stream.feed(token);
    return since(began);
  });
}

void embed(ew::Model& model, const Arguments& arguments) {
  std::optional<std::string> name;
  if (arguments.has("--prompt-name")) name = arguments.text("--prompt-name", "");
  const std::string text = arguments.text("--embed", "");
  const auto print = [&](const std::string& line) { std::cout << Json(model.embed(line, name)).dump() << std::endl; };
  if (text != "-") return print(text);
  for (std::string line; std::getline(std::cin, line);) print(line);
}

int run(int count, char** words) {
  const Arguments arguments(count, words);
  const bool asked = arguments.has("--prompt") || arguments.has("--ids"), embeds = arguments.has("--embed");
  if (arguments.has("--help") || !(asked || embeds || arguments.has("--trace") || arguments.has("--bench"))) {
    std::cout << kUsage;
    return arguments.has("--help") ? 0 : 2;
  }
  ew::LoadOptions options;
  options.check_hashes = !arguments.has("--no-check");
  options.threads = static_cast<int>(std::min<std::size_t>(1024, arguments.count("--threads", 0)));
  ew::Model model(arguments.text("--model", "model"), options);
  if (arguments.has("--trace") && !check_traces(model, arguments.text("--trace", ""))) return 1;
  if (asked) answer(model, arguments);
  if (embeds) embed(model, arguments);
  if (arguments.has("--bench")) bench(model, arguments);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(count, words);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
