// ---- files: read whole, hashed, JSON -------------------------------------------------------------------------------

using Json = nlohmann::json;

[[noreturn]] void fail(const std::string& line) { throw Error(line); }

std::string shown(const fs::path& path) { return path.string(); }

std::string read_file(const fs::path& path) {
  std::error_code trouble;
  if (!fs::is_regular_file(path, trouble)) fail(shown(path) + " is missing; copy the whole folder that app.json lies in");
  std::ifstream file(path, std::ios::binary);
  std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) fail(shown(path) + " cannot be read; look at its permissions");
  return data;
}

Json read_json(const fs::path& path) {
  const std::string text = read_file(path);
  Json value = Json::parse(text, nullptr, false);
  if (value.is_discarded()) fail(shown(path) + " is no JSON; copy the file again");
  return value;
}

// SHA-256 (FIPS 180-4).
class Sha256 {
 public:
  void add(const unsigned char* data, std::size_t size) {
    bytes_ += size;
    while (size > 0) {
      const std::size_t part = std::min(size, block_.size() - held_);
      std::memcpy(block_.data() + held_, data, part);
      held_ += part;
      data += part;
      size -= part;
      if (held_ == block_.size()) {
        mix();
        held_ = 0;
      }
    }
  }

  std::string hex() {
    const std::uint64_t bits = bytes_ * 8;
    const unsigned char one = 0x80, zero = 0;
    add(&one, 1);
    while (held_ != 56) add(&zero, 1);
    std::array<unsigned char, 8> length{};
    for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    add(length.data(), length.size());
    std::string text;
    for (const std::uint32_t word : state_)
      for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[(word >> shift) & 15];
    return text;
  }

 private:
  static constexpr std::array<std::uint32_t, 64> kRounds = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

  void mix() {
    std::array<std::uint32_t, 64> w{};
    for (std::size_t i = 0; i < 16; ++i)
      for (std::size_t b = 0; b < 4; ++b) w[i] = (w[i] << 8) | block_[4 * i + b];
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t x = w[i - 15], y = w[i - 2];
      const std::uint32_t s0 = std::rotr(x, 7) ^ std::rotr(x, 18) ^ (x >> 3);
      const std::uint32_t s1 = std::rotr(y, 17) ^ std::rotr(y, 19) ^ (y >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      const std::uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRounds[i] + w[i];
      const std::uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      const std::uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g;
      g = f;
      f = e;
      e = d + t1;
      d = c;
      c = b;
      b = a;
      a = t1 + t2;
    }
    const std::array<std::uint32_t, 8> now = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) state_[i] += now[i];
  }

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block_{};
  std::size_t held_ = 0;
  std::uint64_t bytes_ = 0;
};

std::string sha256_of(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> chunk(std::size_t{1} << 20);
  Sha256 hash;
  while (file) {
    file.read(chunk.data(), static_cast<std::streamsize>(chunk.size()));
    hash.add(reinterpret_cast<const unsigned char*>(chunk.data()), static_cast<std::size_t>(file.gcount()));
  }
  if (file.bad()) fail(shown(path) + " cannot be read; look at the disk");
  return hash.hex();
}

// Every file of the app has the size and the hash that app.json says.
void check_files(const fs::path& folder, const Json& files, bool hashes) {
  for (const auto& [name, fact] : files.items()) {
    const fs::path path = folder / name;
    std::error_code trouble;
    const auto size = fs::file_size(path, trouble);
    if (trouble) fail(shown(path) + " is missing; copy the whole folder that app.json lies in");
    const auto wanted = fact.at("bytes").get<std::uintmax_t>();
    if (size != wanted)
      fail(shown(path) + " has " + std::to_string(size) + " bytes of " + std::to_string(wanted) + "; download it again");
    if (hashes && sha256_of(path) != fact.at("sha256").get<std::string>())
      fail(shown(path) + " is damaged (its SHA-256 is not that of app.json); download it again");
  }
}
