// An ESP32 asks a qwedge device over MQTT and prints the answer.
//
// Arduino core for ESP32, 3.x; its own MQTT client (ESP-MQTT) publishes at QoS 1, and no library is needed. The payload
// is bare text, and so is the answer: no JSON on this side. The request is sent again, under the same id, until there is
// an answer; the device knows the id and runs it once.

#include <WiFi.h>
#include <esp_random.h>
#include <mqtt_client.h>

static const char *WIFI_NAME = "plant";
static const char *WIFI_PASSWORD = "...";
static const char *BROKER = "mqtt://192.168.1.10:1883";
static const char *CLIENT = "press-7";     // our name in topics, and our MQTT client id
static const char *TARGET = "dev/edge-1";  // or "pool/qwen2.5-coder-0.5b-instruct": any device that serves the model
static const uint32_t AGAIN_MS = 20000;

static esp_mqtt_client_handle_t mqtt;
static volatile bool connected = false;
static SemaphoreHandle_t lock;  // guards what the MQTT task and loop() share
static String prompt, requestId, incoming, answer;
static bool answered = true;

// A message may come in several pieces: the topic stands in the first one only.
static void onData(const esp_mqtt_event_t *event) {
  static String topic;
  if (event->current_data_offset == 0) {
    topic = String(event->topic, event->topic_len);
    incoming = "";
  }
  incoming.concat(event->data, event->data_len);
  if (event->current_data_offset + event->data_len < event->total_data_len) return;
  xSemaphoreTake(lock, portMAX_DELAY);
  String own = String("qwedge/v1/res/") + CLIENT + "/" + requestId + "/done/";
  if (!answered && topic.startsWith(own)) {
    // "429 ..." and "503 ..." pass; loop() sends the request again.
    bool later = topic.endsWith("/error") && (incoming.startsWith("429") || incoming.startsWith("503"));
    if (!later) {
      answer = incoming;
      answered = true;
    }
  }
  xSemaphoreGive(lock);
}

static void onMqtt(void *, esp_event_base_t, int32_t id, void *data) {
  switch ((esp_mqtt_event_id_t)id) {
    case MQTT_EVENT_CONNECTED: {
      String branch = String("qwedge/v1/res/") + CLIENT + "/";
      esp_mqtt_client_subscribe(mqtt, (branch + "+/done/text").c_str(), 1);
      esp_mqtt_client_subscribe(mqtt, (branch + "+/done/error").c_str(), 1);
      connected = true;
      break;
    }
    case MQTT_EVENT_DISCONNECTED:
      connected = false;  // the client connects again by itself
      break;
    case MQTT_EVENT_DATA:
      onData((const esp_mqtt_event_t *)data);
      break;
    default:
      break;
  }
}

static void send() {
  String topic = String("qwedge/v1/") + TARGET + "/req/" + CLIENT + "/" + requestId;
  esp_mqtt_client_publish(mqtt, topic.c_str(), prompt.c_str(), prompt.length(), 1, 0);
}

// Ask, and wait for the answer; empty where there is none in time.
static String ask(const String &question, uint32_t timeoutMs) {
  xSemaphoreTake(lock, portMAX_DELAY);
  prompt = question;
  requestId = String(esp_random(), HEX) + String(esp_random(), HEX);
  answer = "";
  answered = false;
  xSemaphoreGive(lock);
  uint32_t began = millis(), sent = 0;
  bool ever = false;
  while (millis() - began < timeoutMs) {
    if (connected && (!ever || millis() - sent >= AGAIN_MS)) {
      send();
      sent = millis();
      ever = true;
    }
    delay(20);
    xSemaphoreTake(lock, portMAX_DELAY);
    bool done = answered;
    String text = answer;
    xSemaphoreGive(lock);
    if (done) return text;
  }
  return "";
}

void setup() {
  Serial.begin(115200);
  lock = xSemaphoreCreateMutex();
  WiFi.begin(WIFI_NAME, WIFI_PASSWORD);
  while (WiFi.status() != WL_CONNECTED) delay(200);
  esp_mqtt_client_config_t config = {};
  config.broker.address.uri = BROKER;
  config.credentials.client_id = CLIENT;
  config.session.keepalive = 10;
  mqtt = esp_mqtt_client_init(&config);
  esp_mqtt_client_register_event(mqtt, MQTT_EVENT_ANY, onMqtt, nullptr);
  esp_mqtt_client_start(mqtt);
}

void loop() {
  Serial.println(ask("Spindle temperature 81 C, limit 75 C. One short sentence of advice.", 120000));
  delay(60000);
}
